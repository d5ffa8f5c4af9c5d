"""Which mixin does a method's work: the table that a new method is added to."""

from daa_ext.flow_trainer import FlowTrainerMixin
from daa_ext.l2_trainer import L2InitTrainerMixin
from daa_ext.method_config import MethodSettings
from daa_ext.osft_trainer import OsftTrainerMixin
from daa_ext.reweight_trainer import TalrTrainerMixin

MIXINS: dict[str, type] = {  # switch -> what stands before the host's trainer
    "use_talr_loss": TalrTrainerMixin,
    "use_flow_loss": FlowTrainerMixin,
    "use_l2_init": L2InitTrainerMixin,
    "use_osft": OsftTrainerMixin,
}


def mixins(settings: MethodSettings) -> tuple[type, ...]:
    """The mixins of the methods that a YAML switches on, in the order of the table of keys."""
    return tuple(MIXINS[switch] for switch in settings.methods())
