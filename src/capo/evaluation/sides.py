"""The two sides of an evaluation, policy and base, and everything that its results depend on."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from capo.data.engines import Engine
from capo.data.generation import ImageGenerator, PoolSpec
from capo.data.images import GeneratedImages, Side
from capo.errors import InputError
from capo.rewards import Reward

SCHEMA = 4  # of settings.json; results written with another schema are computed again


@dataclass(frozen=True)
class Comparison:
    """Policy and base of one evaluation: their images, the rewards, the zero line and the oracle."""

    spec: PoolSpec
    policy: ImageGenerator
    rewards: Sequence[Reward]
    zero: PoolSpec | None
    oracle: Sequence[Reward]
    encoder: Reward | None
    sample: int
    engine: Engine | None = None  # fills the pools of the base's images; the policy has its own

    def __post_init__(self) -> None:
        if self.zero and list(self.zero.prompts) != list(self.spec.prompts[: len(self.zero.prompts)]):
            raise InputError(
                "the zero line's prompts must be the first test prompts (evaluation.zero_prompts)"
            )

    @property
    def base(self) -> ImageGenerator:
        """Generator of the base's images, with the settings of the policy's."""
        return ImageGenerator.base(self.policy.backbone, self.policy.settings, self.engine)

    def settings(self) -> dict:
        """Everything that the results depend on, as JSON values (settings.json)."""
        spec, zero, fingerprints = self.spec, self.zero, self.policy.backbone.fingerprints
        identity = json.dumps([(prompt.id, prompt.category) for prompt in spec.prompts])
        guide = self.policy.unconditional
        seen = {"seed": spec.seed, "images_per_prompt": spec.candidates}
        unlike = zero and {
            "seed": zero.seed,
            "images_per_prompt": zero.candidates,
            "prompts": len(zero.prompts),
        }
        return {
            "schema": SCHEMA,
            "model": spec.model,
            "policy": self.policy.denoiser_fingerprint,
            "base": fingerprints["denoiser"],
            "policy_generator": self.policy.fingerprint,
            "base_generator": self.base.fingerprint,
            "latent_space": fingerprints["latent_space"],
            "text_encoders": fingerprints["text_encoders"],
            "steps": self.policy.settings.steps,
            "guidance": self.policy.settings.guidance,
            **({"unconditional": guide.fingerprint} if guide else {}),
            "rewards": {reward.name: reward.key for reward in self.rewards},
            "oracle": {measure.name: measure.key for measure in self.oracle},
            **seen,
            "zero": unlike,
            "features": self.encoder and {"of": self.encoder.key, "prompts": self.sample},
            "categories": hashlib.sha256(identity.encode()).hexdigest(),
            "prompts": [prompt.id for prompt in spec.prompts],
        }

    def sides(self, images: Path, progress: bool) -> tuple[Side, Side, dict[str, Tensor]]:
        """Policy, base, and the zero line's scores; missing images and scores are generated first."""
        judges = [*self.rewards, *self.oracle]
        base = GeneratedImages.fill(self.spec, self.base, judges, progress)
        other = self.zero and GeneratedImages.fill(self.zero, self.base, self.rewards, progress)
        tuned = GeneratedImages.fill(replace(self.spec, root=images), self.policy, judges, progress)
        return (
            tuned.side(self.rewards, self.oracle),
            base.side(self.rewards, self.oracle),
            other.scores(self.rewards) if other else {},
        )
