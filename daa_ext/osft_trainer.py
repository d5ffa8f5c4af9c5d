"""use_osft in the host's trainer: orthogonal subspace fine-tuning (OSFT, arXiv:2504.07097) by PEFT.

Each linear layer's W = U_high S_high V_high + U_low S_low V_low: the leading singular triplets
are frozen, the others train, and so does nothing else (embeddings, norms, biases and the output
head keep their values). PEFT projects the gradients of U_low and V_low away from U_high and
V_high; Adam's elementwise scaling brings a little of them back, so U_high^T dW V_high^T is of
second order in the step and not zero. Every run measures it (docs/decisions/0020).

While a model trains its linear layers are PEFT's; what is written, in checkpoints as at the end,
has the base model's names.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import OSFConfig, inject_adapter_in_model
from peft.tuners.osf import OSFLayer
from peft.tuners.osf.utils import reconstruct_weight_matrix
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from daa_ext.fingerprint import model_fingerprint, weight_sum
from daa_ext.guard import refuse_unserved
from daa_ext.passes import DaaRun
from daa_ext.ranks import Ranks
from daa_ext.report import peak_memory, versions, write_report

if TYPE_CHECKING:
    from transformers import Trainer as HostTrainer
else:
    HostTrainer = object

logger = logging.get_logger(__name__)

ADAPTER = "default"
# Of a checkpoint: the factors that train. In a folder, because some readers of a model take every
# *.safetensors beside its config.json for weights of it.
STATE = "osft/factors.safetensors"
FACTORS = f".osf_svd_params.{ADAPTER}."


class OsftTrainerMixin(HostTrainer):
    """Splits the model's linear layers before the optimizer is made, merges them after training."""

    daa_run: DaaRun

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled:
            raise ValueError(
                "use_osft=true does not serve DeepSpeed: ZeRO takes apart the matrices whose "
                "subspaces are kept. Remove deepspeed: one process, or DDP (torchrun)."
            )
        self.preserved = self.daa_run.settings.osft_preserved
        self.batches = 0
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        refuse_unserved("use_osft=true", self.model, named, self.accelerator.distributed_type)
        self.base_fingerprint = model_fingerprint(
            {name: (tuple(p.shape), weight_sum(p)) for name, p in self.model.named_parameters()}
        )
        split(self.model, self.preserved)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = super().train(*args, **kwargs)
        if self.batches == 0:
            raise ValueError(
                "use_osft=true did not act: no training step was taken. Check the data and "
                "max_steps (a finished run in output_dir is resumed unless overwrite_output_dir: "
                "true)."
            )
        self._report(time.perf_counter() - started)
        merge(self.model)
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.batches += 1
        return super().training_step(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not any(True for _ in layers(self.model)):  # merged
            super()._save(output_dir, state_dict)
            return
        super()._save(output_dir, merged_state(self.model))
        factors = {name: p.detach().contiguous() for name, p in self._factors().items()}
        path = Path(output_dir or self.args.output_dir) / STATE
        path.parent.mkdir(exist_ok=True)
        save_file(factors, path, self._metadata())

    def _factors(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if FACTORS in name}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The factors that train; the others follow from the base model, as at the start."""
        path = Path(resume_from_checkpoint) / STATE
        if not path.is_file():
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint}: {STATE} is missing, so it is "
                "not a checkpoint of a run with use_osft: true. Resume from another checkpoint, or "
                "start anew with overwrite_output_dir: true."
            )
        with safe_open(path, "pt") as file:
            then = file.metadata()
            for key, value in self._metadata().items():
                if then.get(key) != value:
                    raise ValueError(
                        f"resume_from_checkpoint={resume_from_checkpoint}: {key}={value} now, but "
                        f"the run that is to be resumed had {key}={then.get(key)}. Resume with the "
                        "same value, or start anew with overwrite_output_dir: true."
                    )
            factors = self._factors()
            assert set(file.keys()) == factors.keys()
            with torch.no_grad():
                for name, parameter in factors.items():
                    parameter.copy_(file.get_tensor(name))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _metadata(self) -> dict[str, str]:
        return {
            "osft_preserved": str(self.preserved),
            "base_fingerprint": self.base_fingerprint,
        }

    def _report(self, wall_seconds: float) -> None:
        ranks = Ranks.of_run(self.args.device)
        peak = ranks.gather(peak_memory())
        report = {
            "stage": "osft",
            "total_steps": self.state.max_steps,
            "datasets": self.daa_run.datasets,
            "osft_preserved": self.preserved,
            "matrices": sum(1 for _ in layers(self.model)),
            "trainable_params": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            **interference(self.model),
            "world_size": ranks.size,
            "wall_seconds": wall_seconds,
            "peak_memory_bytes_per_rank": peak,
            "versions": versions(),
        }
        if self.is_world_process_zero():
            write_report(Path(self.args.output_dir), report)


def split(model: Any, preserved: float) -> None:
    """Replace the linear layers that train by PEFT's OSF layers, in place; all else is frozen.

    The output head is no such layer. Two triplets of factors take the place of one matrix, which
    stays, too: about twice the memory of a square matrix on top of it.

    Args:
        preserved: singular directions that are kept, a share in (0, 1) of each matrix's smaller
            side, rounded down, or a count (int).

    Raises:
        ValueError: in some matrix nothing would be kept, or nothing would train.
    """
    head = model.get_output_embeddings()
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or module is head:
            continue
        if not module.weight.requires_grad:  # a tower that the host keeps frozen
            continue
        side = min(module.weight.shape)
        kept = int(side * preserved) if isinstance(preserved, float) else preserved
        if not 1 <= kept < side:
            raise ValueError(
                f"osft_preserved={preserved} keeps {kept} of the {side} singular directions of "
                f"{name} {tuple(module.weight.shape)}: at least one must be kept, and one left to "
                "train. Set a share between 0 and 1, such as 0.5."
            )
        names.append(name)
    if not names:
        raise ValueError("use_osft=true: the model has no torch.nn.Linear layer that trains.")
    logger.warning(f"OSFT: taking the singular values of {len(names)} matrices.")
    inject_adapter_in_model(
        OSFConfig(effective_rank=preserved, target_modules=names), model, ADAPTER
    )


def layers(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, layer) of the layers that `split` put in."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, OSFLayer))


@torch.no_grad()
def weight(layer: Any) -> Tensor:
    """The matrix that the layer's factors make, as in its forward pass."""
    high = {f"{k}_high": getattr(layer, f"_osf_{k}_high")[ADAPTER] for k in "USV"}
    return reconstruct_weight_matrix({**high, **layer.osf_svd_params[ADAPTER]})


def merged_state(model: Any) -> dict[str, Tensor]:
    """The state dict under the base model's names; the factors multiplied out."""
    state = {
        n.replace(".base_layer.", "."): t for n, t in model.state_dict().items() if FACTORS not in n
    }
    return state | {f"{name}.weight": weight(layer) for name, layer in layers(model)}


def merge(model: Any) -> None:
    """Put the linear layers back, with the weights that were learnt: the inverse of `split`."""
    for name, layer in list(layers(model)):
        linear = layer.get_base_layer()
        linear.weight.data = weight(layer)
        model.set_submodule(name, linear)
    vars(model).pop("peft_config", None)


def interference(model: Any) -> dict[str, float]:
    """How much of the update dW = W - W0 lies in the subspaces that are to be kept.

    Over all matrices together, relative to ||dW||: `leak` is U_high^T dW V_high^T, `leak_left`
    U_high^T dW, `leak_right` dW V_high^T. dW includes the rounding of the factors (fp32).
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for _, layer in layers(model):
        U, V = layer._osf_U_high[ADAPTER], layer._osf_V_high[ADAPTER]
        update = weight(layer) - layer.get_base_layer().weight.detach()
        left = U.T @ update
        for i, part in enumerate((update, left @ V.T, left, update @ V.T)):
            sums[i] += part.square().sum(dtype=torch.float64).cpu()
    total, *parts = sums.sqrt().tolist()
    names = ("leak", "leak_left", "leak_right")
    shares = (part / total if total > 0.0 else 0.0 for part in parts)
    return {"update_norm": total, **dict(zip(names, shares, strict=True))}
