"""Low-rank corrections `W + s·B·A`: the factors, and the layers that carry them, shared by LoRA and its relatives.

A method hands `wrap` a function that makes the factors of one matrix (a `Place`); which layer carries them is decided
here, by the module's type, for all methods alike.
"""

from lightning_peft.lowrank.factors import LowRank as LowRank
from lightning_peft.lowrank.factors import Place as Place
from lightning_peft.lowrank.factors import kaiming as kaiming
from lightning_peft.lowrank.layers import LowRankConv as LowRankConv
from lightning_peft.lowrank.layers import LowRankConv1D as LowRankConv1D
from lightning_peft.lowrank.layers import LowRankEmbedding as LowRankEmbedding
from lightning_peft.lowrank.layers import LowRankLinear as LowRankLinear
from lightning_peft.lowrank.siblings import link as link
from lightning_peft.lowrank.weights import LowRankAttention as LowRankAttention
from lightning_peft.lowrank.weights import LowRankProjection as LowRankProjection
from lightning_peft.lowrank.weights import LowRankStack as LowRankStack
from lightning_peft.lowrank.wrapping import adapts as adapts
from lightning_peft.lowrank.wrapping import factors_of as factors_of
from lightning_peft.lowrank.wrapping import frozen_names as frozen_names
from lightning_peft.lowrank.wrapping import is_linear as is_linear
from lightning_peft.lowrank.wrapping import places as places
from lightning_peft.lowrank.wrapping import read_by_parents as read_by_parents
from lightning_peft.lowrank.wrapping import read_children as read_children
from lightning_peft.lowrank.wrapping import with_output as with_output
from lightning_peft.lowrank.wrapping import wrap as wrap
