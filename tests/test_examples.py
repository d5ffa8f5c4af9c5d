"""Every example YAML parses to what it says and takes a real step; the DeepSpeed files hold."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from host import report, steps, weights

from daa_ext.method_config import METHODS as OUR_SWITCHES

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "yaml"
PAPER = ("daa_anchor_llama31_8b", "finance", "law", "medicine", "news_qa")
DEEPSPEED = sorted((ROOT / "deepspeed_configs").glob("*.json"))
MAIN = "daa_finance"
GENERAL = ROOT / "examples" / "data" / "general_train.jsonl"

# stem -> (daa_stage, daa_gga, daa_dc) of a DAA run
DAA = {
    "daa_finance": ("auto", True, True),
    "daa_anchor": ("anchor", True, True),
    "daa_anneal": ("anneal", True, True),
    "ablation_al": ("auto", False, False),
    "ablation_al_gga": ("auto", True, False),
    "ablation_al_dc": ("auto", False, True),
    "ablation_all": ("auto", True, True),
    "daa_talr": ("auto", True, True),
    "daa_boost_cap": ("auto", True, True),
    "daa_radius": ("auto", True, True),
}
# stem -> (finetuning_type, the host's switches that are on)
BASELINES: dict[str, tuple[str, set[str]]] = {
    "baseline_direct": ("full", set()),
    "baseline_small_lr": ("full", set()),
    "baseline_mix_1_1": ("full", set()),
    "baseline_mix_1_3": ("full", set()),
    "baseline_mix_1_5": ("full", set()),
    "baseline_replay_1": ("full", set()),
    "baseline_replay_5": ("full", set()),
    "baseline_replay_10": ("full", set()),
    "baseline_lora": ("lora", set()),
    "baseline_dora": ("lora", {"use_dora"}),
    "baseline_freeze": ("freeze", set()),
    "baseline_galore": ("full", {"use_galore"}),
    "baseline_apollo": ("full", {"use_apollo"}),
    "baseline_dft": ("full", {"use_dft_loss"}),
    "baseline_eaft": ("full", {"use_eaft_loss"}),
    "baseline_asft": ("full", {"use_asft_loss"}),
    "talr": ("full", set()),
    "flow": ("full", set()),
    "l2_init": ("full", set()),
    "osft": ("full", set()),
}
SWITCHES = set().union(*(on for _, on in BASELINES.values()))
# stem -> switches of methods beside DAA
METHODS = {
    "talr": ["use_talr_loss"],
    "flow": ["use_flow_loss"],
    "daa_talr": ["use_talr_loss"],
    "l2_init": ["use_l2_init"],
    "osft": ["use_osft"],
}
REPLAYED = {1: 5, 5: 24, 10: 48}  # per cent -> samples of general data beside 480 of finance
OWN_RATE = ("baseline_galore", "baseline_small_lr")
RUNNABLE = (*DAA, *BASELINES)
NO_FULL_TUNING = ("daa_anchor", "baseline_lora", "baseline_dora")


def _param(name: str) -> Any:
    """The name, skipped where the package of its optimizer is missing."""
    needed = {"baseline_galore": "galore_torch", "baseline_apollo": "apollo_torch"}.get(name)
    missing = needed is not None and importlib.util.find_spec(needed) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"needs {needed}"))


BASELINE_NAMES = [_param(name) for name in BASELINES]


def text(name: str) -> dict[str, Any]:
    """What the YAML says, before any parser of the host's dataclasses."""
    from omegaconf import OmegaConf

    yaml = (FOLDER / f"{name}.yaml").read_text(encoding="ascii")
    return OmegaConf.to_container(OmegaConf.create(yaml))


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`llamafactory-cli train NAME.yaml key=value ...` up to the parsed arguments, in one bag."""

    def parsed(name: str, *overrides: str) -> SimpleNamespace:
        from llamafactory.hparams import get_train_args, read_args

        monkeypatch.chdir(tmp_path)  # no saves/ of an earlier run there
        line = ["llamafactory-cli", str(FOLDER / f"{name}.yaml"), "use_cpu=true", *overrides]
        monkeypatch.setattr(sys, "argv", line)
        parts = get_train_args(read_args())
        return SimpleNamespace(**{k: v for part in parts for k, v in vars(part).items()})

    return parsed


def test_every_example_is_expected_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(RUNNABLE)
    assert {path.stem for path in (FOLDER / "paper").glob("*.yaml")} == set(PAPER)
    assert len(DEEPSPEED) == 6


@pytest.mark.parametrize("name", DAA)
def test_daa_examples_parse(parse: Any, name: str) -> None:
    args = parse(name)
    assert (args.daa_stage, args.daa_gga, args.daa_dc) == DAA[name]
    assert (args.use_daa, args.finetuning_type) == (True, "full")
    assert args.dataset == ["general_demo" if name == "daa_anchor" else "finance_demo"]


@pytest.mark.parametrize("name", BASELINE_NAMES)
def test_baselines_parse(parse: Any, name: str) -> None:
    args = parse(name)
    on = {switch for switch in SWITCHES if getattr(args, switch)}
    assert (args.finetuning_type, on) == BASELINES[name]
    assert not args.use_daa
    general = {f"baseline_replay_{share}": f"general_demo_{n}" for share, n in REPLAYED.items()}
    if "mix" in name or name in general:
        assert args.dataset == ["finance_demo", general.get(name, "general_demo")]
    else:
        assert args.dataset == ["finance_demo"]


@pytest.mark.parametrize("name", [*DAA, *BASELINE_NAMES])
def test_methods_are_switched_on(parse: Any, name: str) -> None:
    args = parse(name)
    assert [key for key in OUR_SWITCHES if getattr(args, key)] == METHODS.get(name, [])


@pytest.mark.parametrize("name", RUNNABLE)
def test_runs_can_be_compared(name: str) -> None:
    """Data, length and seed are the main job's; so are, where they are meant, rate and betas."""
    main, own = text(MAIN), text(name)
    keys = "model_name_or_path dataset_dir cutoff_len num_train_epochs seed bf16 use_cpu "
    keys += "per_device_train_batch_size gradient_accumulation_steps"
    for key in keys.split():
        assert own.get(key) == main.get(key), key
    assert own["template"] == text("baseline_direct")["template"] or name == MAIN
    if name not in NO_FULL_TUNING:
        assert own["adam_beta2"] == 0.95
        assert own["lr_scheduler_type"] == "linear"
        assert not [key for key in own if "warmup" in key]
        assert own["learning_rate"] == main["learning_rate"] or name in OWN_RATE
    for key in own.keys() & main.keys() & {"daa_k0", "daa_c0", "daa_rank", "daa_anchor_dataset"}:
        assert own[key] == main[key], key


def test_examples_that_share_an_anchor_describe_it_alike() -> None:
    """Reuse does not compare template and length: the examples must agree by themselves."""
    described: dict[str, tuple[Any, ...]] = {}
    for name in DAA:
        own = text(name)
        anchor = tuple(own[key] for key in ("model_name_or_path", "template", "cutoff_len"))
        assert described.setdefault(own["daa_anchor"], anchor) == anchor, name


@pytest.mark.parametrize("general", [1, 3, 5])
def test_mixtures_hold_their_ratio_and_all_of_the_domain(parse: Any, general: int) -> None:
    from datasets import Dataset
    from llamafactory.data.data_utils import merge_dataset

    args = parse(f"baseline_mix_1_{general}")
    sets = [Dataset.from_dict({"row": range(800)}), Dataset.from_dict({"row": range(-404, 0)})]
    mixed = list(merge_dataset(sets, args, args.seed)["row"])
    domain = [row for row in mixed if row >= 0]  # the first set, as in the YAML
    assert set(domain) == set(range(800))
    assert (len(mixed) - len(domain)) / len(domain) == pytest.approx(general, rel=0.1)


@pytest.mark.parametrize("share", REPLAYED)
def test_replay_adds_exactly_its_share(
    parse: Any, monkeypatch: pytest.MonkeyPatch, share: int
) -> None:
    """num_samples is drawn first, max_samples cuts each set afterwards, concat joins them."""
    from llamafactory.data import loader

    args = parse(f"baseline_replay_{share}")
    args.dataset_dir = str(ROOT / args.dataset_dir)
    monkeypatch.setattr(loader, "align_dataset", lambda dataset, *_: dataset)
    merged = loader._get_merged_dataset(args.dataset, args, args, args, "sft")
    general = {tuple(json.loads(line).values()) for line in GENERAL.read_text().splitlines()}
    rows = [tuple(row.values()) for row in merged]
    added = [row for row in rows if row in general]
    assert (len(rows) - len(added), len(set(added))) == (480, REPLAYED[share])
    assert len(added) == REPLAYED[share] == round(480 * share / 100)


@pytest.mark.parametrize("name", PAPER)
def test_paper_examples_parse_to_the_papers_numbers(parse: Any, name: str) -> None:
    from llamafactory.data.parser import get_dataset_list

    args = parse(f"paper/{name}")
    assert args.model_name_or_path == "meta-llama/Llama-3.1-8B"
    assert (args.bf16, args.disable_gradient_checkpointing) == (True, False)
    assert (args.use_daa, args.daa_rank, args.daa_anchor_beta) == (True, 512, 0.999)
    assert args.daa_stage == ("anchor" if "anchor" in name else "anneal")
    if args.daa_stage == "anneal":
        assert (args.learning_rate, args.lr_scheduler_type) == (1.0e-7, "linear")
        assert args.warmup_steps == 0
        assert (args.daa_k0, args.daa_c0, args.daa_gga, args.daa_dc) == (200.0, 0.01, True, True)
        assert (args.adam_beta1, args.adam_beta2) == (0.9, 0.95)
    assert args.daa_anchor == "anchors/llama31-8b"
    (mapped,) = get_dataset_list(args.dataset, str(ROOT / args.dataset_dir))
    assert mapped.load_from == ("file" if name == "news_qa" else "hf_hub")
    assert None not in (mapped.prompt, mapped.response)
    other = parse(f"paper/{name}", "model_name_or_path=/m", "dataset=org/set", "dataset_dir=ONLINE")
    (online,) = get_dataset_list(other.dataset, other.dataset_dir)
    assert (other.model_name_or_path, online.load_from) == ("/m", "hf_hub")
    assert (online.prompt, online.query, online.response) == ("instruction", "input", "output")


@pytest.fixture(scope="module")
def small(
    tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What makes an example small: the tiny model and data under the demo's names, one step."""
    folder = tmp_path_factory.mktemp("examples")
    names = ("finance_demo", "finance_demo_test", "general_demo", "general_demo_heldout")
    files = (tiny_data / f"{n}.jsonl" for n in ("domain", "domain_test", "general", "general_test"))
    info: dict[str, Any] = {n: {"file_name": str(f)} for n, f in zip(names, files, strict=True)}
    for count in REPLAYED.values():
        info[f"general_demo_{count}"] = {**info["general_demo"], "num_samples": count}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return {
        "model_name_or_path": str(tiny_model), "dataset_dir": str(folder), "template": "default",
        "cutoff_len": 64, "cache_dir": str(folder / "cache"), "max_steps": 1, "logging_steps": 1,
        "plot_loss": False,
    }  # fmt: skip


def take_step(name: str, small: dict[str, Any], folder: Path, anchor: Path) -> Path:
    """Run the example in this process, on `small`; returns its output folder."""
    from llamafactory.train.tuner import run_exp

    arguments = text(name) | small | {"output_dir": str(folder / name)}
    if "daa_anchor" in arguments:
        arguments["daa_anchor"] = str(anchor)
    run_exp(arguments)
    return folder / name


@pytest.fixture(scope="module")
def anchor(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that daa_anchor.yaml writes."""
    folder = tmp_path_factory.mktemp("anchor")
    take_step("daa_anchor", small, folder, folder / "anchor")
    return folder / "anchor"


def test_the_anchor_example_writes_an_anchor(anchor: Path) -> None:
    assert {path.name for path in anchor.iterdir()} == {"anchor.json", "anchor.safetensors"}
    output = anchor.parent / "daa_anchor"
    assert report(output)["stage"] == "anchor"
    assert not list(output.rglob("*.safetensors"))  # and no model


@pytest.mark.parametrize("name", [name for name in DAA if name != "daa_anchor"])
def test_daa_examples_take_a_step(
    name: str, small: dict[str, Any], anchor: Path, tmp_path: Path
) -> None:
    stage, gga, dc = DAA[name]
    own = anchor if stage == "anneal" else tmp_path / "anchor"  # auto builds one
    output = take_step(name, small, tmp_path, own)
    found = report(output)
    elements = sum(tensor.numel() for tensor in weights(output).values())
    assert found["anchored_params"] == found["trainable_params"] == elements
    assert found["domain_only"]
    assert found["retention"] is not None
    (step,) = steps(output)
    assert step["gamma"] == (1.0 if gga else 0.0)  # at T = 1 the rule is capped
    floor = 1 / text(name)["daa_boost_max"] ** 2 if name == "daa_boost_cap" else 0.0
    corrected = max(step["similarity"] + 0.01, floor)
    assert step["correction"] == (pytest.approx(corrected) if dc else 1.0)


@pytest.mark.parametrize("name", BASELINE_NAMES)
def test_baselines_take_a_step(name: str, small: dict[str, Any], tmp_path: Path) -> None:
    output = take_step(name, small, tmp_path, tmp_path / "none")
    adapter = BASELINES[name][0] == "lora"
    assert (output / "adapter_model.safetensors").is_file() == adapter
    assert (output / "model.safetensors").is_file() != adapter
    results = json.loads((output / "all_results.json").read_text())
    if name != "baseline_asft":
        assert {"eval_finance_demo_test_loss", "eval_general_demo_heldout_loss"} <= results.keys()
    assert (output / "daa_report.json").is_file() == (name in ("l2_init", "osft"))


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_configs(path: Path, tmp_path: Path) -> None:
    """transformers fills in every "auto" and agrees; DeepSpeed knows every ZeRO key."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from transformers import TrainingArguments
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations import deepspeed as integration

    stage = int(path.stem[4])
    config = HfDeepSpeedConfig(str(path))
    filled = integration.HfTrainerDeepSpeedConfig(str(path))
    integration.unset_hf_deepspeed_config()  # they are global; other tests must not run under one
    assert (config.is_zero2(), config.is_zero3()) == (stage == 2, stage == 3)
    assert config.is_offload() == path.stem.endswith("offload")
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=True)
    filled.trainer_config_process(arguments)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=64))
    filled.trainer_config_finalize(arguments, model, num_training_steps=10)
    assert '"auto"' not in json.dumps(filled.config)
    zero = DeepSpeedZeroConfig(**filled.config["zero_optimization"])
    assert zero.stage == stage
    assert not zero.round_robin_gradients  # DeepSpeed's own mapping of fragments dies on it
