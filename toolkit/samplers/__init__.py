"""Task samplers: each family in a file of its own, all obeying the `TaskSampler` protocol of `toolkit.task`."""

from toolkit.samplers.augment import Augmented, by_torchvision, crop_flip
from toolkit.samplers.check import Report, check_sampler
from toolkit.samplers.classes import AllClasses
from toolkit.samplers.completion import Completion
from toolkit.samplers.curves import Harmonics, SineOrLine, Steps
from toolkit.samplers.episodes import Episodes
from toolkit.samplers.linear import Linear
from toolkit.samplers.loaders import Loaders, MetaTask, joint_epochs
from toolkit.samplers.mixed import Mixed
from toolkit.samplers.semi import SemiEpisodes
from toolkit.samplers.sinusoid import Sinusoid
from toolkit.samplers.tasksets import FromTaskset
from toolkit.samplers.variable import VariableEpisodes

__all__ = [
    "AllClasses", "Augmented", "Completion", "Episodes", "FromTaskset", "Harmonics", "Linear", "Loaders", "MetaTask", "Mixed",
    "Report", "SemiEpisodes", "SineOrLine", "Sinusoid", "Steps", "VariableEpisodes", "by_torchvision", "check_sampler",
    "crop_flip", "joint_epochs",
]  # fmt: skip
