"""TALR and FLOW where they cannot act: refused in words, or loud at the end; and after training."""

from pathlib import Path
from typing import Any

import pytest
from host import Host, same, weights

from daa_ext import stages

LOSSES = ("use_talr_loss", "use_flow_loss")


@pytest.mark.parametrize("switch", LOSSES)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dft_loss": True}, "cannot go with use_dft_loss=true"),
        ({"use_asft_loss": True}, "cannot go with use_asft_loss=true"),
        ({"use_eaft_loss": True}, "cannot go with use_eaft_loss=true"),
        ({"stage": "pt", "dataset": "texts"}, "cannot go with stage=pt"),
        ({"finetuning_type": "oft"}, "cannot go with finetuning_type=oft"),
    ],
)
def test_refused_when_the_yaml_is_read(
    host: Host, switch: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{switch}=true {message}"):
        host.run(host.arguments("run", **{switch: True}, **changes))
    assert not (host.folder / "run").exists()


@pytest.mark.parametrize("switch", LOSSES)
def test_label_smoothing_is_refused(host: Host, switch: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^label_smoothing_factor=0.1 has no effect with {switch}"
    ):
        host.run(host.arguments("run", label_smoothing_factor=0.1, **{switch: True}))


@pytest.mark.parametrize(
    "changes", [{"packing": True}, {"neat_packing": True}, {"streaming": True, "max_steps": 2}]
)
def test_flow_needs_samples_that_it_can_find_again(host: Host, changes: dict[str, Any]) -> None:
    key = "streaming" if "streaming" in changes else "packing"
    with pytest.raises(ValueError, match=rf"^use_flow_loss=true cannot go with {key}=true: .* Set"):
        host.run(host.arguments("run", use_flow_loss=True, **changes))


@pytest.mark.parametrize("typo", ["use_talr", "flow_taus"])
def test_a_misspelt_key_gets_the_close_one(host: Host, typo: str) -> None:
    with pytest.raises(ValueError, match=f"^{typo} is not a setting: did you mean "):
        host.run(host.arguments("run", **{typo: True}))


def test_a_key_without_its_switch_is_refused(host: Host) -> None:
    with pytest.raises(ValueError, match=r"^talr_tau=2.0 has no effect without use_talr_loss"):
        host.run(host.arguments("run", talr_tau=2.0))


@pytest.mark.parametrize("switch", LOSSES)
def test_a_run_in_which_nothing_was_weighted_fails(host: Host, switch: str) -> None:
    """A finished run is resumed: no step is left to take."""
    saving = {switch: True, "save_strategy": "steps", "save_steps": 6}
    done = host.run(host.arguments("run", **saving))
    with pytest.raises(ValueError, match=f"^{switch}=true, but no batch was weighted"):
        host.run(host.arguments("run", resume_from_checkpoint=str(done / "checkpoint-6"), **saving))


def test_a_call_that_bypasses_the_method_is_refused(host: Host) -> None:
    from llamafactory.hparams import get_train_args

    parsed = get_train_args(host.arguments("run", use_talr_loss=True))
    with pytest.raises(RuntimeError, match="does not pass through daa_ext"):
        stages._installed["sft"].function(*parsed, callbacks=[])


def test_a_plain_run_after_ours_is_the_hosts(host: Host) -> None:
    before = host.run(host.arguments("before", disable_shuffling=False))
    host.run(host.arguments("talr", use_talr_loss=True))
    after = host.run(host.arguments("after", disable_shuffling=False, use_talr_loss=False))
    assert same(weights(before), weights(after))


@pytest.mark.parametrize("other", ["use_l2_init", "use_osft"])
def test_a_loss_goes_beside_a_method_that_keeps_it(host: Host, other: str) -> None:
    apart = host.run(host.arguments("apart", **{other: True}))
    flat = host.run(host.arguments("flat", use_talr_loss=True, talr_w_min=1.0, **{other: True}))
    both = host.run(host.arguments("both", use_talr_loss=True, **{other: True}))
    assert same(weights(apart), weights(flat))
    assert not same(weights(apart), weights(both))


@pytest.mark.parametrize("switch", LOSSES)
def test_export_and_chat_take_the_same_yaml(host: Host, switch: str, tmp_path: Path) -> None:
    from llamafactory.chat import ChatModel
    from llamafactory.train.tuner import export_model

    trained = host.run(host.arguments("run", **{switch: True}))
    yaml: dict[str, Any] = {
        "model_name_or_path": str(trained), "template": "default", "finetuning_type": "full",
        "infer_dtype": "float32", switch: True,
    }  # fmt: skip
    export_model({**yaml, "export_dir": str(tmp_path / "exported")})
    assert same(weights(tmp_path / "exported"), weights(trained))
    answer = ChatModel(yaml).chat([{"role": "user", "content": "Is it?"}], max_new_tokens=2)
    assert len(answer) == 1
