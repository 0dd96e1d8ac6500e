"""Rotary settings under the keys of transformers 4; `make test-older` shows that version 4 reads them."""

from anchorembed.model.transformers4 import transformers4_rope

YARN = {"rope_type": "yarn", "rope_theta": 7.0, "factor": 2.0, "partial_rotary_factor": 0.5}


def test_one_kind_of_layer() -> None:
    assert transformers4_rope({"rope_type": "default", "rope_theta": 7.0}) == {"rope_theta": 7.0}
    scaling = {"rope_type": "yarn", "factor": 2.0}
    assert transformers4_rope(YARN) == {"rope_theta": 7.0, "partial_rotary_factor": 0.5, "rope_scaling": scaling}


def test_full_and_sliding_layers() -> None:
    nested = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 3.0}}
    assert transformers4_rope(nested) == transformers4_rope(YARN) | {"rope_local_base_freq": 3.0}


def test_no_rotary_settings() -> None:
    assert transformers4_rope({}) == {}
