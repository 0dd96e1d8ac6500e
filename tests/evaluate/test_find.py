"""Names are folders, files, or mteb's tasks and benchmarks; what means nothing is refused."""

from pathlib import Path

import pytest

from anchorembed.errors import InputError
from anchorembed.evaluate.find import find_tasks
from judged_files import write_rows


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
