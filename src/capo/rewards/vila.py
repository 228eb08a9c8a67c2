"""VILA: the visual quality of an image, whatever its prompt, from a published tensorflow model.

It runs in a separate process (`isolated: true` in its yaml), where torch and this package may be missing;
this module imports neither.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

PUBLISHED = "google/vila/image/1"
HANDLE = f"https://tfhub.dev/{PUBLISHED}"  # answers 403 (tensorflow/hub issues 922 and 932), unless cached
KAGGLE = "https://www.kaggle.com/models/google/vila"  # the same model, to be unpacked by hand
AT_ONCE = 8  # images whose scores are computed at the same time
INPUT, OUTPUT = "serving_default", "predictions"  # the model's signature, and its answer


class VILA:
    """VILA: the model's own prediction, one number per image; prompts are not read.

    It is the cosine of the image and the text "good image", trained to be higher by 0.1 for the better of two
    images.

    Args:
        weights: folder of a SavedModel (saved_model.pb and variables), such as Kaggle's copy unpacked, or a
            handle that tensorflow_hub downloads or has cached. A SavedModel is a graph of tensorflow
            operations without Python code, but some operations read and write files: use one from a source
            that you trust.

    Raises:
        ValueError: the weights are neither, or another model's, or do not give one number per image.
        OSError: the handle cannot be downloaded.
    """

    known_weights = (HANDLE,)  # others, whose operations may write files, a run's config.yaml may not name
    takes = "png"  # the signature takes a file's bytes, which the model decodes and resizes itself

    def __init__(self, weights):
        weights = os.path.expanduser(weights)
        if os.path.isabs(weights) or os.path.isdir(weights):
            if not os.path.isfile(os.path.join(weights, "saved_model.pb")):
                raise ValueError(
                    f"weights={weights}: that folder holds no saved_model.pb; give the unpacked folder of "
                    f"{PUBLISHED} ({KAGGLE})"
                )
        elif not weights.startswith("https://"):
            raise ValueError(f"weights={weights}: not a folder, and not a handle such as {HANDLE}")
        self.weights = weights
        # The model is kept because a signature alone does not keep its variables alive.
        self.model: Any = None
        self.predict: Any = None

    def to(self, device):
        """Load the model onto `device`, as torch names it; a tensorflow without GPU stays on the CPU."""
        import tensorflow as tf  # pyright: ignore[reportMissingModuleSource, reportMissingImports]

        kind, _, index = str(device).partition(":")
        seen = [gpu for gpu in tf.config.list_physical_devices("GPU") if kind == "cuda"][int(index or 0) :][
            :1
        ]
        tf.config.set_visible_devices(seen, "GPU")
        for gpu in seen:
            # Without growth tensorflow would take all memory of the GPU.
            tf.config.experimental.set_memory_growth(gpu, True)
        self.predict = self._signature(tf)

    def __call__(self, images, prompts):
        """Return scores, a list of B floats, of the bytes of B image files."""
        if self.predict is None:
            self.to("cpu")
        import tensorflow as tf  # pyright: ignore[reportMissingModuleSource, reportMissingImports]

        # The signature takes one file. Several calls at once decode and resize while another is in the model.
        with ThreadPoolExecutor(AT_ONCE) as threads:
            return list(threads.map(lambda image: self._score(tf, image), images))

    def _score(self, tf, image):
        return _number(self.predict(tf.constant(image))[OUTPUT].numpy())

    def _signature(self, tf):
        self.model = (
            _downloaded(self.weights)
            if self.weights.startswith("https://")
            else tf.saved_model.load(self.weights)
        )
        found = getattr(self.model, "signatures", {})
        if INPUT not in found or OUTPUT not in found[INPUT].structured_outputs:
            raise ValueError(
                f"weights={self.weights}: another model's: it has no signature {INPUT} that gives {OUTPUT}; "
                f"this reward reads {PUBLISHED}"
            )
        return found[INPUT]


def _downloaded(handle):
    import tensorflow_hub  # pyright: ignore[reportMissingImports]  # an extra

    try:
        return tensorflow_hub.load(handle)
    except Exception as error:  # tensorflow_hub's, tensorflow's and urllib's share no base class
        raise OSError(
            f"weights={handle} are not available ({error}); tfhub.dev answers tensorflow_hub 403: "
            f"download Kaggle's copy (variation image, {KAGGLE}), unpack it and give its folder, "
            "rewards.vila.weights=FOLDER, or set TFHUB_CACHE_DIR to a cache that holds the handle"
        ) from error


def _number(prediction):
    if prediction.size != 1:
        raise ValueError(
            f"the model gave {prediction.size} numbers per image, of shape {prediction.shape}; this reward "
            f"reads {PUBLISHED}"
        )
    return float(prediction.reshape(-1)[0])
