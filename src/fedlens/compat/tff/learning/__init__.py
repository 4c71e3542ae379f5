"""`tff.learning`: models, optimizers and processes."""

from fedlens.compat.tff.absent import refusing as _refusing
from fedlens.compat.tff.learning import algorithms as algorithms
from fedlens.compat.tff.learning import models as models
from fedlens.compat.tff.learning import optimizers as optimizers
from fedlens.compat.tff.learning import templates as templates
from fedlens.compat.tff.learning.weighting import ClientWeighting as ClientWeighting

__getattr__ = _refusing(__name__)
