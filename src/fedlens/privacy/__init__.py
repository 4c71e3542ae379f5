"""Mechanisms of differential privacy as computations: what they do is known to `fed.disclosure`."""

from fedlens.privacy.clipping import clip as clip
from fedlens.privacy.gaussian import gaussian_noise as gaussian_noise
from fedlens.privacy.gaussian import local_gaussian as local_gaussian
