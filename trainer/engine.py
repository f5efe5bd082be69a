"""DeepSpeed behind one door: configuration -> engine; forward, backward, step, save, load. Nothing else imports it.

Mixed precision is torch's autocast round the network, weights and gradients in float32, at every ZeRO stage alike.
DeepSpeed's own ways are not used: "bf16" turns batch norm's weights to bf16 beside float32 statistics, which torch
refuses, and at ZeRO 0 its empty first step shrinks Adam's first real one to 0.74; "torch_autocast" in fp16 keeps a loss
scale that never falls at ZeRO 1 to 3, and adds up gradients in 16 bits there (all seen with 0.19.8).
"""

from __future__ import annotations

import io
import math
from argparse import Namespace
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster.build_cache import prepare_builds
from cluster.errors import UserError
from trainer.batch_norm import statistics_held
from trainer.config import StageOneConfig
from trainer.model import Classifier, Output
from trainer.optimiser import build_optimiser, parameter_groups

CHECKPOINT_TAG = "engine"
AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def deepspeed_settings(config: StageOneConfig, world: int) -> dict[str, Any]:
    """The settings that DeepSpeed is given: a pure function of ours, the raw `deepspeed` section merged last."""
    settings: dict[str, Any] = {
        # Only bookkeeping for DeepSpeed: ranks may hold batches of different size, the objective weighs them.
        "train_micro_batch_size_per_gpu": max(1, config.batch_size // world),
        # The engine says itself which backward pass of a step is the last.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimiser.clip_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,  # SGD is not on DeepSpeed's list; our tests hold it to ZeRO 0
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    settings = _merge(settings, config.deepspeed)
    if "optimizer" in settings:
        given = settings["optimizer"].get("params", {})
        settings["optimizer"] = {**settings["optimizer"], "params": {"lr": config.optimiser.lr, **given}}
    return settings


class TrainedNetwork(nn.Module):
    """What the engine trains: the classifier, under autocast, and the metric loss's centres, proxies or prototypes.

    The loss itself stays outside: ZeRO 3 would look for tensors in what it takes and gives, which are no tensors.
    """

    def __init__(self, classifier: Classifier, metric_loss: nn.Module | None, dtype: torch.dtype | None, device: str):
        super().__init__()
        self.classifier = classifier
        self.of_loss = nn.ParameterList(metric_loss.parameters() if metric_loss is not None else [])
        self._dtype, self._device = dtype, device

    def forward(self, images: Tensor) -> Output:
        """As the classifier's."""
        return self.run(self.classifier, images)

    def run(self, classifier: Classifier, images: Tensor) -> Output:
        """Another classifier, e.g. the moving average, in the same precision."""
        # Inside the module: DeepSpeed switches an autocast off that is round its own forward.
        with torch.autocast(self._device, dtype=self._dtype or torch.bfloat16, enabled=self._dtype is not None):
            return classifier(images)


class Engine:
    """A network under DeepSpeed: forward, backward with the gradient averaged over ranks, step, save, load.

    Attributes:
        settings: What DeepSpeed was given.
        grad_norm: 2-norm of the last step's gradient, averaged over ranks, before clipping.
    """

    def __init__(
        self, model: Classifier, config: StageOneConfig, world: int, device: str, metric_loss: nn.Module | None = None
    ):
        """Take a model over; every rank takes part.

        Args:
            model: On its device, with the same weights on every rank.
            config: Stage one's configuration.
            world: Number of workers.
            device: `cuda` or `cpu`.
            metric_loss: Its parameters, if it has any, are trained along.

        Raises:
            UserError: DeepSpeed refuses the raw settings, or has no such optimiser for this device.
        """
        import deepspeed
        import deepspeed.ops

        prepare_builds()
        if device == "cpu":
            # An operator for inference, which DeepSpeed would build here: 40 s, g++ and ninja, and a lock that stays
            # where the build is killed. Training never calls it.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Ray Train has made the process group; DeepSpeed takes it over.
        deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo", verbose=False)
        if config.compile:
            model.backbone.compile()
        network = TrainedNetwork(model, metric_loss, AUTOCAST_DTYPES[config.precision], device)
        groups = parameter_groups(model, list(network.of_loss), config.optimiser.weight_decay)
        of_loss = {id(p) for p in network.of_loss}
        # By position: DeepSpeed makes the groups' parameters anew, and keeps their order.
        self._lr_ratios = [config.loss.lr_ratio if id(group["params"][0]) in of_loss else 1.0 for group in groups]
        self.settings = deepspeed_settings(config, world)
        given: dict[str, Any] = {"model_parameters": groups}
        if config.optimiser.name != "deepspeed":
            given = {"optimizer": build_optimiser(groups, config.optimiser)}
        try:
            self._engine, self._optimiser, _, _ = deepspeed.initialize(
                model=network, config=self.settings, dist_init_required=False, **given
            )
        except Exception as error:
            if not config.deepspeed:
                raise
            raise UserError(
                f"DeepSpeed refuses stage_one.deepspeed = {config.deepspeed} on {device} "
                f"({' '.join(str(error).split())[:300]}); change or leave out what it names"
            ) from error
        self._network, self._zero_stage = network, config.zero_stage
        self._parameters = list(network.parameters())
        if world == 1 and self._zero_stage == 0:
            self._engine.enable_backward_allreduce = False  # nothing to average: two copies of the gradient less
        if self._zero_stage == 3:
            # The loss reads them after the network's forward pass: they are gathered with it and stay until the step.
            for parameter in network.of_loss:
                deepspeed.zero.register_external_parameter(network, parameter)
                parameter.is_external_param = True
        self._recomputed = model if model.checkpoint_activations else None
        self._scaler = self._loss_scaler() if config.precision == "fp16" else None
        self.grad_norm = math.nan

    @property
    def model(self) -> Classifier:
        """The model itself, its weights in float32 whatever the precision of the arithmetic."""
        return self._network.classifier

    @property
    def loss_scale(self) -> float | None:
        """Factor of the loss under fp16; None otherwise."""
        return self._scaler.cur_scale if self._scaler is not None else None

    @property
    def overflowed(self) -> bool:
        """After a step that did not update the weights: whether the loss scale was too large, and has been lowered."""
        return self._scaler is not None and self._scaler.cur_scale > self._scaler.min_scale

    def train(self, mode: bool = True) -> None:
        """As `nn.Module.train`."""
        self._network.train(mode)

    def __call__(self, images: Tensor) -> Output:
        """The network's output for images [B, 3, px, px]. At ZeRO 3 every rank takes part."""
        return self._engine(images)

    def run(self, model: Classifier, images: Tensor) -> Output:
        """The output of a model that is not trained, in the engine's precision."""
        return self._network.run(model, images)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the loss's gradient, averaged over ranks, to that of this step. Every rank takes part.

        Args:
            loss: Scalar.
            last: No other backward of this step follows.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        if self._scaler is not None and self._zero_stage == 0:
            loss = loss * self._scaler.cur_scale
        # Activations that are computed a second time must not move the running statistics a second time.
        with statistics_held(self._recomputed) if self._recomputed is not None else nullcontext():
            self._engine.backward(loss)

    def step(self, lr: float) -> bool:
        """Update the weights at learning rate `lr`, unless the gradient is not finite. Every rank takes part.

        Returns:
            Whether they were updated: the same on every rank. If not, they are as they were and the gradient is gone.
        """
        for group, ratio in zip(self._optimiser.param_groups, self._lr_ratios, strict=True):
            group["lr"] = lr * ratio
        if self._zero_stage == 0 and not self._gradient_is_finite():
            self._engine.zero_grad()
            return False
        self._engine.step()
        if self._zero_stage > 0:  # there DeepSpeed looks itself, over all ranks' parts
            self.grad_norm = float(self._engine.get_global_grad_norm())
        return self._engine.was_step_applied()

    def save(self, folder: Path) -> None:
        """Write this rank's share of the checkpoint below `folder`. Every rank takes part."""
        scaler = self._scaler.__dict__ if self._scaler is not None and self._zero_stage == 0 else {}
        self._engine.save_checkpoint(str(folder), tag=CHECKPOINT_TAG, client_state={"loss_scaler": scaler})

    def load(self, folder: Path, universal: bool = False) -> None:
        """Go on from a verified checkpoint. Every rank takes part.

        Args:
            folder: Of `save`.
            universal: It was made by another number of ranks and is in DeepSpeed's universal format now.
        """
        self._engine._config.load_universal_checkpoint = universal
        _, state = self._engine.load_checkpoint(str(folder), tag=CHECKPOINT_TAG)
        self._engine._config.load_universal_checkpoint = False
        if self._scaler is None:
            return
        if self._zero_stage == 0:
            self._scaler.__dict__.update(state["loss_scaler"])
        else:  # DeepSpeed has put the saved one in its place
            self._scaler = self._optimiser.loss_scaler

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors by name, whole; at ZeRO 3 on rank 0 only. Every rank takes part."""
        import deepspeed
        import torch.distributed as dist

        if self._zero_stage < 3:
            return {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        whole = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        for name, parameter in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if dist.get_rank() == 0:
                    whole[name] = parameter.detach().to("cpu", copy=True).contiguous()
        return whole if dist.get_rank() == 0 else {}

    def _gradient_is_finite(self) -> bool:
        """At ZeRO 0, after backward: every rank has the whole averaged gradient, so all of them see the same."""
        for parameter in self._parameters:
            if parameter.grad is None and parameter.requires_grad:  # as averaging does: unused weights decay, too
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if self._scaler is not None:
            torch._foreach_mul_(gradients, 1 / self._scaler.cur_scale)
        self.grad_norm = float(nn.utils.get_total_norm(gradients))
        finite = math.isfinite(self.grad_norm)
        if self._scaler is not None:
            self._scaler.update_scale(not finite)
        return finite

    def _loss_scaler(self) -> Any:
        """DeepSpeed's dynamic loss scale; at ZeRO 1 to 3 its optimiser applies it itself."""
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

        scaler = DynamicLossScaler(2.0**16, 1000, 1.0, 1, False, raise_error_at_min_scale=False)
        if self._zero_stage > 0:
            self._optimiser.loss_scaler, self._optimiser.dynamic_loss_scale = scaler, True
        return scaler


def convert_to_universal(source: Path, destination: Path) -> None:
    """DeepSpeed's own converter: what one number of ranks has saved -> what any number can load.

    Args:
        source: The checkpoint's folder of DeepSpeed's files, `FOLDER / CHECKPOINT_TAG`.
        destination: Likewise, an empty folder.
    """
    from deepspeed.checkpoint import ds_to_universal

    wanted = Namespace(
        input_folder=str(source),
        output_folder=str(destination),
        num_extract_workers=1,  # more of them are processes, which a worker of Ray's must not fork
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        ds_to_universal.main(wanted)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
