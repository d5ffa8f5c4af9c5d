"""OSFT through the host: what stays, what moves, what is written, what a resume needs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from host import Host, report, same, weights
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from daa_ext.osft_trainer import STATE, interference, layers, merge, merged_state, split

IDS = torch.arange(3, 40)[None]
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}


def base(host: Host) -> Any:
    return AutoModelForCausalLM.from_pretrained(host.model)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def osft(host: Host, name: str, **changes: Any) -> dict[str, Any]:
    return host.arguments(name, **{"use_osft": True, **changes})


class Watch(TrainerCallback):
    """What the trainer's model has in its factors, and says, before and after training."""

    def _look(self, model: Any) -> tuple[dict[str, Tensor], Tensor]:
        high = {f"{n}.{k}": getattr(layer, f"_osf_{k}_high")["default"].clone()
                for n, layer in layers(model) for k in "USV"}  # fmt: skip
        assert high
        training = model.training
        seen = logits(model)
        model.train(training)
        return high, seen

    def on_train_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.before = self._look(model)
        self.trained = [n for n, p in model.named_parameters() if p.requires_grad]

    def on_train_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.after = self._look(model)


@pytest.fixture(scope="module")
def ran(
    tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Host, Watch, Path]:
    host, watch = Host(tmp_path_factory.mktemp("osft"), tiny_model, tiny_data), Watch()
    return host, watch, host.run(osft(host, "run", **SAVING), watch)


def test_outputs_at_the_start_are_the_base_models(ran: tuple[Host, Watch, Path]) -> None:
    host, watch, _ = ran
    torch.testing.assert_close(watch.before[1], logits(base(host)), rtol=1e-4, atol=1e-5)


def test_only_low_factors_of_linear_layers_train(ran: tuple[Host, Watch, Path]) -> None:
    host, watch, out = ran
    assert len(watch.trained) == 3 * 7 * base(host).config.num_hidden_layers
    assert all(".osf_svd_params." in name for name in watch.trained)
    changed = {n for n, w in weights(out).items() if not torch.equal(w, weights(host.model)[n])}
    assert changed == {n for n in weights(host.model) if "_proj." in n}


def test_the_high_factors_are_bitwise_unchanged(ran: tuple[Host, Watch, Path]) -> None:
    _, watch, _ = ran
    assert same(watch.before[0], watch.after[0])
    assert not torch.equal(watch.before[1], watch.after[1]), "the model must have learnt"


def test_what_is_written_is_the_trained_model_under_the_bases_names(
    ran: tuple[Host, Watch, Path],
) -> None:
    host, watch, out = ran
    found, start = weights(out), weights(host.model)
    assert {n: w.shape for n, w in found.items()} == {n: w.shape for n, w in start.items()}
    assert {w.dtype for w in found.values()} == {w.dtype for w in start.values()}
    loaded = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(loaded), watch.after[1], rtol=1e-4, atol=1e-5)
    assert not list(out.glob("adapter*"))
    checkpoint = AutoModelForCausalLM.from_pretrained(out / "checkpoint-6")
    assert torch.equal(logits(checkpoint), logits(loaded))


def leaks(found: dict[str, Tensor], start: dict[str, Tensor], kept: float) -> dict[str, float]:
    """The shares of the update in the kept subspaces, by an SVD in float64."""
    sums = dict.fromkeys(("all", "both", "left", "right"), 0.0)
    for name in (n for n in start if "_proj." in n):
        W = start[name].double()
        U, _, Vt = torch.linalg.svd(W, full_matrices=False)
        k = int(min(W.shape) * kept)
        update = found[name].double() - W
        left, right = U[:, :k].T @ update, update @ Vt[:k].T
        parts = {"all": update, "both": left @ Vt[:k].T, "left": left, "right": right}
        for key, part in parts.items():
            sums[key] += float(part.square().sum())
    return {key: (value / sums["all"]) ** 0.5 for key, value in sums.items()}


def test_the_update_keeps_out_of_the_kept_subspace(ran: tuple[Host, Watch, Path]) -> None:
    """Second order in the step, not zero: PEFT projects gradients, and Adam's step is no
    projection of anything. One-sided it is of first order. Plain tuning puts far more there."""
    host, _, out = ran
    found = leaks(weights(out), weights(host.model), 0.5)
    plain = leaks(weights(host.run(host.arguments("plain"))), weights(host.model), 0.5)
    assert found["both"] < 0.02
    assert plain["both"] > 0.3
    content = report(out)
    for key, name in (("both", "leak"), ("left", "leak_left"), ("right", "leak_right")):
        assert content[name] == pytest.approx(found[key], rel=0.05, abs=1e-4)


def test_the_leak_is_of_second_order(host: Host) -> None:
    small, large = (
        report(host.run(osft(host, f"rate{rate}", learning_rate=rate, max_steps=1)))
        for rate in (3e-3, 3e-2)
    )
    assert large["update_norm"] == pytest.approx(10 * small["update_norm"], rel=0.2)
    assert large["leak"] == pytest.approx(10 * small["leak"], rel=0.3)
    assert large["leak_left"] == pytest.approx(small["leak_left"], rel=0.2)


def test_the_report(ran: tuple[Host, Watch, Path]) -> None:
    host, _, out = ran
    content = report(out)
    assert content["stage"] == "osft"
    assert content["matrices"] == 14
    low = sum(
        sum(w.shape) * (k := min(w.shape) - min(w.shape) // 2) + k
        for n, w in weights(host.model).items()
        if "_proj." in n
    )
    assert content["trainable_params"] == low


@pytest.mark.parametrize("step", [1, 4])
def test_resume_is_bitwise(host: Host, step: int) -> None:
    shuffled: dict[str, Any] = {"disable_shuffling": False, **SAVING}
    whole = host.run(osft(host, "whole", **shuffled))
    resumed: dict[str, Any] = {"resume_from_checkpoint": str(whole / f"checkpoint-{step}")}
    again = host.run(osft(host, "again", **resumed, **shuffled))
    assert same(weights(whole), weights(again))
    with pytest.raises(ValueError, match=r"osft_preserved=0\.25 now, but .* osft_preserved=0\.5"):
        host.run(osft(host, "other", osft_preserved=0.25, **resumed, **shuffled))


def test_resume_of_a_plain_run_and_of_a_finished_one_are_refused(host: Host) -> None:
    plain = host.run(host.arguments("plain", **SAVING))
    resumed = {"resume_from_checkpoint": str(plain / "checkpoint-1")}
    with pytest.raises(ValueError, match=r"osft/factors\.safetensors is missing, so it is not"):
        host.run(osft(host, "again", **resumed))
    out = host.run(osft(host, "run", **SAVING))
    with pytest.raises(ValueError, match="use_osft=true did not act: no training step"):
        host.run(osft(host, "late", resume_from_checkpoint=str(out / "checkpoint-6"), **SAVING))


def test_the_best_model_is_the_one_that_is_merged(host: Host) -> None:
    out = host.run(
        osft(
            host, "run", **SAVING, eval_strategy="steps", eval_steps=1, eval_dataset="domain_test",
            load_best_model_at_end=True, greater_is_better=True,  # the worst: never the last
        )
    )  # fmt: skip
    best = Path(json.loads((out / "trainer_state.json").read_text())["best_model_checkpoint"])
    assert best.name == "checkpoint-1"
    assert same(weights(best), weights(out))
    assert not same(weights(out / "checkpoint-6"), weights(out))


@pytest.mark.parametrize("preserved", [0.25, 3])
def test_share_and_count(host: Host, preserved: float) -> None:
    model = base(host)
    split(model, preserved)
    for _, layer in layers(model):
        side = min(layer.get_base_layer().weight.shape)
        kept = preserved if isinstance(preserved, int) else int(side * preserved)
        assert layer._osf_S_high["default"].shape == (kept,)
    assert interference(model)["update_norm"] < 1e-4
    state = merged_state(model)
    merge(model)
    assert same(state, dict(model.state_dict()))
    assert not list(layers(model))
    torch.testing.assert_close(logits(model), logits(base(host)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"osft_preserved": 32},
            r"osft_preserved=32 keeps 32 of the 32 singular directions of mod",
        ),
        ({"osft_preserved": 0.01}, r"osft_preserved=0\.01 keeps 0 of the"),
        ({"finetuning_type": "lora"}, "use_osft=true cannot go with finetuning_type=lora"),
        ({"use_l2_init": True}, "use_l2_init=true cannot go with use_osft=true"),
    ],
)
def test_what_cannot_be_is_refused(host: Host, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        host.run(osft(host, "run", **changes))


def test_two_ranks_equal_one_process_and_deepspeed_is_refused(host: Host) -> None:
    common: dict[str, Any] = {"adam_epsilon": 1e-5}
    one = host.run(osft(host, "one", **common))
    ddp = osft(host, "two", per_device_train_batch_size=4, ddp_backend="gloo", **common)
    config = host.folder / "z3.json"
    config.write_text('{"zero_optimization": {"stage": 3}, "train_batch_size": "auto"}')
    zero3 = osft(host, "zero", deepspeed=str(config), use_cpu=None)
    errors = host.ranks([ddp, zero3], 2, check=False)
    assert [found.get(0) for found in errors] == [None, None]
    assert all("use_osft=true does not serve DeepSpeed" in found[1] for found in errors)
    start = weights(host.model)
    off = sum(float((weights(host.folder / "two")[n] - w).square().sum())
              for n, w in weights(one).items())  # fmt: skip
    moved = sum(float((weights(one)[n] - w).square().sum()) for n, w in start.items())
    assert (off / moved) ** 0.5 < 1e-3


def test_the_factors_of_a_checkpoint_are_complete(ran: tuple[Host, Watch, Path]) -> None:
    _, watch, out = ran
    assert set(load_file(out / "checkpoint-1" / STATE)) == set(watch.trained)
