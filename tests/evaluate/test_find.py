"""Names are folders, files, or mteb's tasks and benchmarks; what means nothing is refused."""

from pathlib import Path

import pytest

from anchorembed.errors import InputError
from anchorembed.evaluate.find import find_tasks
from judged_files import write_rows


def test_each_file_of_a_folder_is_a_task_but_other_parts_beside_a_test(data: Path, said: list[str]) -> None:
    folder = data / "classes"
    for source, target in (("pairs.jsonl", "pairs.jsonl"), ("sts/s_test.jsonl", "similarity.jsonl")):
        (data / source).rename(folder / target)
    (data / "beir").rename(folder / "faq")
    for name in ("c_dev.jsonl", "c_trial.jsonl", "t_train.jsonl"):
        (folder / name).write_bytes((folder / "c_train.jsonl").read_bytes())
    assert [task.name for task in find_tasks([str(folder)])] == ["c_test", "pairs", "similarity"]
    assert said == [
        f"{folder}: only its files are read. It holds BEIR folders. Name one or more of: {folder / 'faq'}.",
        f"{folder}: not evaluated, by their names: t_train.jsonl. Rename what is a test.",
    ]


def test_a_folder_without_a_test_is_refused(data: Path) -> None:
    (data / "classes" / "c_test.jsonl").unlink()
    (data / "beir").rename(data / "classes" / "faq")
    with pytest.raises(InputError, match=r"no test is in it, .*\(c_train\.jsonl\)\. Add a test.*BEIR folders.*faq"):
        find_tasks([str(data / "classes")])


def test_training_texts_may_be_in_another_format(data: Path) -> None:
    """Those in the test's own format are taken first."""
    test, train = data / "classes" / "c_test.csv", data / "classes" / "c_train.csv"
    test.write_text("text,label\nsort,a\nopen,b\n", encoding="utf-8")
    before = find_tasks([str(test)])[0].revision
    train.write_text("text,label\nx,a\ny,b\n", encoding="utf-8")
    after = find_tasks([str(test)])[0].revision
    assert before != after
    for other in data.glob("classes/*.jsonl"):
        other.unlink()
    assert find_tasks([str(test)])[0].revision == after


def test_a_split_is_of_beir_folders_alone(data: Path, said: list[str]) -> None:
    (data / "beir" / "qrels" / "test.tsv").rename(data / "beir" / "qrels" / "dev.tsv")
    names = [str(data / name) for name in ("beir", "sts", "pairs.jsonl")]
    assert [task.name for task in find_tasks(names, split="dev")] == ["beir-dev", "s_test", "pairs"]
    assert said == ["split dev: only BEIR folders have splits. Evaluated as without it: s_test, pairs."]
    said.clear()
    find_tasks(names[1:])
    assert said == []


@pytest.mark.slow
def test_what_is_no_task_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"SciFakt: neither a folder or file here.*Did you mean 'SciFact'"):
        find_tasks(["SciFakt"])
    with pytest.raises(InputError, match="two tasks have this name"):
        find_tasks([str(data / "beir"), str(data / "beir")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither a BEIR folder"):
        find_tasks([str(tmp_path / "empty")])
    with pytest.raises(InputError, match="training texts beside it"):
        find_tasks([str(data / "classes" / "c_train.jsonl")])
    write_rows(data / "classes" / "c_test.jsonl", [{"text": "x", "label": "unseen"}])
    with pytest.raises(InputError, match="'unseen' is in no training text"):
        find_tasks([str(data / "classes")])
    write_rows(data / "classes" / "c_train.jsonl", [{"sentence1": "x", "sentence2": "y", "score": 1}])
    with pytest.raises(InputError, match=r"c_train\.jsonl: it has columns of STS\. Give text and label"):
        find_tasks([str(data / "classes")])


@pytest.mark.slow
def test_names_of_mteb_are_known() -> None:
    (task,) = find_tasks(["SciFact"])
    assert (task.name, task.kind, task.task.metadata.main_score) == ("SciFact", "Retrieval", "ndcg_at_10")
    assert len(find_tasks(["NanoBEIR"])) > 5
