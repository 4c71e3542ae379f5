"""Small networks for the data sets that come with fedlens, as Flax modules for `fed.models.from_flax`.

They are ordinary modules: nothing in fedlens treats them differently from a user's own.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedlens.learning.recurrent import LSTM


class DigitsCNN(nn.Module):
    """Two 3x3 convolutions, one 2x2 pooling, one hidden dense layer; 38,282 parameters for the 8 by 8 digits.

    Attributes:
      channels: the output channels of each convolution.
      dense: the width of the hidden dense layer.
      classes: how many classes to tell apart.
    """

    channels: tuple[int, ...] = (16, 32)
    dense: int = 64
    classes: int = 10

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width colours"]) -> Float[Array, "batch classes"]:
        """The logits of a batch of images."""
        for channels in self.channels:
            x = nn.relu(nn.Conv(channels, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(self.dense)(x.reshape(len(x), -1)))
        return nn.Dense(self.classes)(x)


class MLP(nn.Module):
    """A multilayer perceptron with ReLU between its dense layers; inputs of any shape are flattened.

    Attributes:
      hidden: the widths of the hidden layers; none gives logistic regression.
      classes: how many classes to tell apart.
    """

    hidden: tuple[int, ...] = (200, 200)
    classes: int = 10

    @nn.compact
    def __call__(self, x: Float[Array, "batch *features"]) -> Float[Array, "batch classes"]:
        """The logits of a batch."""
        x = x.reshape(len(x), -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)


class CharacterLSTM(nn.Module):
    """Predicts the next character after each one: embedding, stacked LSTM layers, and a dense layer over the symbols.

    The model of McMahan et al., AISTATS 2017, for Shakespeare: embedding 8, LSTM 256 twice.

    Attributes:
      vocabulary: how many symbols there are.
      embedding: the length of a symbol's vector.
      units: the state size of each LSTM layer.
      layers: how many LSTM layers are stacked.
    """

    vocabulary: int = 79
    embedding: int = 8
    units: int = 256
    layers: int = 2

    @nn.compact
    def __call__(self, x: Int[Array, "batch steps"]) -> Float[Array, "batch steps vocabulary"]:
        """The logits of the symbol that follows each step."""
        states = nn.Embed(self.vocabulary, self.embedding)(jnp.asarray(x))
        for _ in range(self.layers):
            states = LSTM(self.units)(states)
        return nn.Dense(self.vocabulary)(states)
