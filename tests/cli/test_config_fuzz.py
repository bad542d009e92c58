"""No settings, however odd, make ``kl-plugins explain --host`` fail in another way than by naming them."""

from __future__ import annotations

import contextlib
import importlib
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kl_plugins.settings import Settings, UnreadableError, read_text
from tests.support.configs import explained, hosts

VALUES = st.sampled_from(
    [
        *(
            "true",
            "False",
            "none",
            "null",
            "auto",
            "",
            "0",
            "-1",
            "1e-3",
            "0.5",
            "16",
            "nan",
            "inf",
            "$X",
            "${a.b}",
            "[1,2]",
        ),
        *("k1", "k2", "k3", "kl", "low_var_kl+", "full", "default", "k1@loss", "k1@advantage", "k2@loss/is:prefix"),
        *("exact@loss", "k2@reward", "k2@los", "sequence", "grpo", "gspo", "rloo", "adaptive", "token-mean", "luspo"),
        *(
            "seq-mean-token-sum-norm",
            "dr_grpo",
            "token",
            "off",
            "separate_async",
            "vllm",
            "server",
            "processed_logprobs",
        ),
    ]
)


def defaults(host: str) -> list[str]:
    module = importlib.import_module(f"{hosts()[host].explainer}.defaults")
    return list({"trl": lambda: {**module.GRPO, **module.RLOO}}.get(host, lambda: module.DEFAULTS)())


@pytest.mark.parametrize("host", ["trl", "verl", "openrlhf"])
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_odd_values_are_explained(host: str, data: st.DataObject) -> None:
    keys = defaults(host)
    chosen = data.draw(st.dictionaries(st.sampled_from(keys), VALUES, max_size=8))
    form = "--{}={}" if host == "openrlhf" else "{}={}"
    words = " ".join(form.format(key, value) for key, value in chosen.items())
    version = data.draw(st.sampled_from([*hosts()[host].tested, "0.5.0", "99.0"]))
    told = explained(host, words or "a=1", version)
    labels = [label for label in told.statements if label.split()[0] == "KL"]  # "KL 1" and "KL 2" with two terms
    assert labels
    assert all(told.statements[label] for label in labels)
    assert json.loads(json.dumps(told.to_dict()))["host"] == host


@settings(deadline=None, max_examples=150)
@given(
    text=st.text(alphabet=st.sampled_from("ab=:$({[\"'\\\n #-&;|<>)}],.0 "), max_size=60),
    suffix=st.sampled_from(["", ".sh", ".py", ".yaml", ".ipynb"]),
)
def test_odd_texts_are_read_or_named(text: str, suffix: str) -> None:
    with contextlib.suppress(UnreadableError):
        assert isinstance(read_text(text, "odd", None, suffix), Settings)
