"""Task samplers: each family in a file of its own, all obeying the `TaskSampler` protocol of `toolkit.task`."""

from toolkit.samplers.augment import Augmented, crop_flip
from toolkit.samplers.classes import AllClasses
from toolkit.samplers.episodes import Episodes
from toolkit.samplers.linear import Linear
from toolkit.samplers.loaders import Loaders, MetaTask, joint_epochs
from toolkit.samplers.sinusoid import Sinusoid

__all__ = [
    "AllClasses", "Augmented", "Episodes", "Linear", "Loaders", "MetaTask", "Sinusoid", "crop_flip", "joint_epochs",
]  # fmt: skip
