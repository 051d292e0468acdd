"""Lightning callbacks, one a file."""

from lightning_peft.callbacks.adapter_drop import AdapterDrop as AdapterDrop
from lightning_peft.callbacks.log_adapter import LogAdapter as LogAdapter
from lightning_peft.callbacks.merge import MergeOnFitEnd as MergeOnFitEnd
from lightning_peft.callbacks.peft import PEFT as PEFT
from lightning_peft.callbacks.prediction_writer import PredictionWriter as PredictionWriter
from lightning_peft.callbacks.trainability import TrainabilityCheck as TrainabilityCheck
