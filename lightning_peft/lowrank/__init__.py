"""Low-rank corrections `W + s·B·A`: the factors, and the layers that carry them, shared by LoRA and its relatives.

A method hands `adapt_layer` a function that makes the factors of one matrix (a `Place`); where the correction is made
is decided there, by the module's type, for all methods alike.
"""

from lightning_peft.lowrank.adapting import adapt_layer as adapt_layer
from lightning_peft.lowrank.adapting import adapts as adapts
from lightning_peft.lowrank.adapting import factors_of as factors_of
from lightning_peft.lowrank.adapting import frozen_names as frozen_names
from lightning_peft.lowrank.adapting import is_linear as is_linear
from lightning_peft.lowrank.adapting import places as places
from lightning_peft.lowrank.adapting import stacked as stacked
from lightning_peft.lowrank.adapting import with_output as with_output
from lightning_peft.lowrank.factors import LowRank as LowRank
from lightning_peft.lowrank.factors import Place as Place
from lightning_peft.lowrank.factors import kaiming as kaiming
from lightning_peft.lowrank.layers import LowRankConv as LowRankConv
from lightning_peft.lowrank.layers import LowRankEmbedding as LowRankEmbedding
from lightning_peft.lowrank.layers import LowRankLinear as LowRankLinear
from lightning_peft.lowrank.weights import LowRankWeights as LowRankWeights
