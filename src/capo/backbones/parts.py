"""The modules of a pipeline: on which device they are, and how the denoiser's weights are stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import RLock
from typing import ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from torch import nn

from capo.backbones.drawing import PLAIN, Drawing, prepared
from capo.backbones.finite import check_finite
from capo.backbones.loading import load_component
from capo.backbones.models import Autoencoder, Denoiser
from capo.backbones.precision import cpu_copy, half_stored, stored_for
from capo.errors import InputError, first_line
from capo.runtime.memory import memory_of, ran_out

DENOISER, TEXT = "denoiser", "text_encoders"  # parts that a process may do without (`Backbone`'s `parts`)
TEXT_ENCODER = "text_encoder"  # how the names of a pipeline's text encoders begin
_lock = RLock()  # of `_held`, and of moves
# id of a module that was moved -> its users, the device to go back to
_held: dict[int, tuple[int, torch.device]] = {}


class NoRoom(InputError, torch.OutOfMemoryError):
    """A module of a pipeline does not fit onto the device; it may be caught as torch's own error too."""


class Parts:
    """Where the modules of a pipeline are, and how its denoiser is stored.

    On a device other than the CPU, a module is there while it works, and on the CPU otherwise: text encoders
    while they encode, the VAE while it decodes or encodes, the denoiser while it draws. Whatever uses one
    places it by itself; code that uses it often holds it there with `placed`.

    The denoiser is held once. It is stored as `prepare` was told to, for a mixed precision in half of the
    memory; a copy with the weights as they were loaded (`trainable_copy`) is then read from the files again.
    Training under the same precision has the denoiser itself as its reference (`reference`), and any other
    training a copy.
    """

    denoiser_component: ClassVar[str]

    folder: Path
    variant: str | None
    dtype: torch.dtype
    pipeline: DiffusionPipeline
    _drawing: Drawing = PLAIN  # how the denoiser is stored
    _channels_last = False  # whether it was loaded in that memory format
    _device: torch.device | None = None
    _visited: torch.device | None = None

    @property
    def denoiser(self) -> Denoiser:
        """The base's denoiser, frozen and in eval mode."""
        return getattr(self.pipeline, self.denoiser_component)

    @property
    def vae(self) -> Autoencoder:
        """The base's VAE, frozen."""
        return self.pipeline.vae

    @property
    def text_encoders(self) -> list[nn.Module]:
        """The base's text encoders, frozen."""
        return [
            part
            for name, part in self.pipeline.components.items()
            if name.startswith(TEXT_ENCODER) and isinstance(part, nn.Module)
        ]

    def check_weights(self, denoiser: nn.Module) -> None:
        """Raise InputError for a weight of `denoiser`, or of a text encoder, that is not finite.

        For the cause of latents that are not: a pass over a large text encoder takes seconds.
        """
        name = self.denoiser_component
        if denoiser is self.denoiser:
            check_finite(str(self.folder / name), denoiser)
        else:
            check_finite(f"the policy's {name}", denoiser, "export it again, or use another policy")
        for component, part in self.pipeline.components.items():
            if component.startswith(TEXT_ENCODER) and isinstance(part, nn.Module):
                check_finite(str(self.folder / component), part)

    @property
    def device(self) -> torch.device:
        """Device on which parts work: the one of `to`, or within `visiting` the one given there."""
        return self._visited or self._device or self.denoiser.device

    def to(self, device: str | torch.device) -> Self:
        """Let the parts work on `device` from now on; until they do, all of them are on the CPU."""
        self._device = torch.device(device)
        for part in self.pipeline.components.values():
            if isinstance(part, nn.Module) and _place(part) not in (None, torch.device("cpu")):
                _move(part, torch.device("cpu"))
        return self

    @contextmanager
    def visiting(self, device: str | torch.device) -> Iterator[Self]:
        """Let the parts work on `device` within the block."""
        before, self._visited = self._visited, torch.device(device)
        try:
            yield self
        finally:
            self._visited = before

    @contextmanager
    def placed(self, *modules: nn.Module | None) -> Iterator[None]:
        """Hold modules, parts or others, on the device within the block, and move them back after it.

        Any number of threads may hold the same module; the last one moves it back. Modules that are there
        already stay. Raises RuntimeError for a part that was not loaded, and NoRoom for one that does not fit
        onto the device; it is then where it was.
        """
        device = self.device
        with ExitStack() as stack:
            for module in modules:
                if module is not None and _take(module, device):
                    stack.callback(_release, module)
            yield

    def prepare(self, drawing: Drawing) -> Self:
        """Store the denoiser, in place, as it draws under `drawing`; call it before the denoiser is used.

        Raises ValueError for another drawing than that of an earlier call.
        """
        if self._drawing not in (PLAIN, drawing):
            raise ValueError(f"the denoiser is prepared for {self._drawing}, not for {drawing}")
        self._drawing = drawing
        prepared(self.denoiser, drawing)
        return self

    def trainable_copy(self) -> Denoiser:
        """Copy the denoiser for training: on the CPU, in float32, all parameters trainable, without dropout.

        Its weights are those that were loaded, whatever the denoiser is stored in. Dropout is off even in
        train mode: it would make policy and reference differ at equal weights.
        """
        if self._drawing == PLAIN:
            copied = cpu_copy(self.denoiser)
        else:
            kind, component = type(self.denoiser), self.denoiser_component
            copied = load_component(self.folder, component, kind, self.variant, self.dtype)
            if self._channels_last:
                copied.to(memory_format=torch.channels_last)
        policy = copied.float().requires_grad_(True)
        for module in policy.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return policy

    def reference(self, precision: str) -> Denoiser:
        """Return the reference whose outputs equal, bit for bit, those of a float32 policy with its weights.

        Under autocast its linear and convolution weights are stored in autocast's dtype, to which it would
        round them anyway, and all other weights in float32: half the memory. Without autocast all are
        float32. Where the denoiser is stored so, it is the reference; otherwise that is a copy, on the CPU.
        """
        if self._drawing.plain_blocks and stored_for(self.denoiser, precision):
            return self.denoiser
        return half_stored(self.trainable_copy(), precision).eval().requires_grad_(False)


def _place(module: nn.Module) -> torch.device | None:
    """Device of a module's weights; None without weights, and for a part that was not loaded."""
    parameter = next(module.parameters(), None)
    return None if parameter is None or parameter.is_meta else parameter.device


def _move(module: nn.Module, device: torch.device) -> None:
    with torch.inference_mode(False):  # weights that were moved in it could not be trained or copied later
        module.to(device)


def _no_room(module: nn.Module, error: BaseException) -> str:
    size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    return (
        f"{type(module).__name__} of the model ({size / 1e9:.1f} GB) does not fit into {memory_of(error)}: "
        "end what else is on the device, set model.backbone.dtype=bfloat16, or use a device with more memory "
        f"({first_line(error)})"
    )


def _same(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (None in (one.index, other.index) or one.index == other.index)


def _take(module: nn.Module, device: torch.device) -> bool:
    """Move a module to `device`, and count this user of it; False where there is nothing to move back."""
    with _lock:
        home = _place(module)
        if home is None and next(module.parameters(), None) is not None:
            raise RuntimeError(
                f"{type(module).__name__} was not loaded: `parts` of the backbone leaves it out"
            )
        if id(module) in _held:
            if home is not None and not _same(home, device):
                raise RuntimeError(f"{type(module).__name__} is held on {home} and cannot work on {device}")
            users, home = _held[id(module)]
        elif home is None or _same(home, device):
            return False
        else:
            users = 0
            try:
                _move(module, device)
            except BaseException as error:  # half of it may be there, which would count as the whole
                _move(module, home)
                if ran_out(error):
                    raise NoRoom(_no_room(module, error)) from error
                raise
        _held[id(module)] = users + 1, home
        return True


def _release(module: nn.Module) -> None:
    with _lock:
        users, home = _held.pop(id(module))
        if users > 1:
            _held[id(module)] = users - 1, home
        else:
            _move(module, home)
