"""Sections of a run config: in how many bits the dense part computes and embeddings are sent."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from planner.tables import DataType
from shardemb.section import Section


class PrecisionConfig(Section):
    """Parameters, gradients, optimizers, loss and evaluation are in fp32 under each of them."""

    dense: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="of matrix products of the dense part, by autocast; auto: bf16 where the "
        "device multiplies in it and rows of a step x dense weights are at least 1e8",
    )


class CommunicationConfig(Section):
    """Embeddings and their gradients on the way between ranks; rows that are summed over ranks are
    summed in this precision too."""

    forward: DataType = Field(default="fp32", description="embeddings")
    backward: DataType = Field(default="fp32", description="their gradients")
