"""The settings of every head. No torch in this file: `featstore --help` reads it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from featstore.config import PATH, Section


class ProjectorConfig(Section):
    """Heads that project every patch first and classify with one linear layer; all of mean and max."""

    embed_dim: int = Field(
        512, ge=1, le=65536, description="width of the projected embeddings; dual_stream: hidden_dim"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout wherever none is set apart")
    projector_dropout: float | None = Field(
        None, ge=0, lt=1, description="after the projector, in all heads but dual_stream"
    )
    classifier_dropout: float | None = Field(
        None, ge=0, lt=1, description="before the classifier, in all heads but dual_stream"
    )

    def rate(self, own: float | None) -> float:
        """A dropout that is set apart, or the one for all."""
        return self.dropout if own is None else own


class AttentionConfig(ProjectorConfig):
    """Heads with attention pools; all of abmil and gated_abmil."""

    attention_hidden: int = Field(
        128,
        ge=1,
        le=65536,
        description="width of the hidden layer of hierarchical's, abmil's, clam_sb's pools",
    )
    attention_dropout: float | None = Field(
        None, ge=0, lt=1, description="inside the attention pools of hierarchical, abmil, clam_sb"
    )


class HierarchicalConfig(AttentionConfig):
    """The hierarchical head."""

    attention_pool: Literal["tanh", "gated", "multi_head", "transformer"] = Field(
        "tanh", description="hierarchical: tanh | gated | multi_head | transformer"
    )


class ClamConfig(AttentionConfig):
    """The single-branch head of CLAM."""

    k_sample: int = Field(
        8,
        ge=1,
        description="clam_sb: most and least attended patches that the instance loss asks of a case",
    )
    bag_weight: float = Field(
        0.7, gt=0, le=1, description="clam_sb: the bag's share of the loss; the rest is the instance loss's"
    )
    subtyping: bool = Field(
        False, description="clam_sb: classes exclude one another on patches too, as subtypes do"
    )


class DsmilConfig(ProjectorConfig):
    """The DSMIL head."""

    attention_dim: int = Field(128, ge=1, description="dsmil: width of the queries")


class TransMILConfig(ProjectorConfig):
    """The head TransMIL."""

    transmil_heads: int = Field(8, ge=1, le=1024, description="transmil: attention heads a layer")
    transmil_attention: Literal["auto", "nystrom", "exact"] = Field(
        "auto",
        description="transmil: nystrom: linear in the patches | exact | auto: exact up to 2,500 patches",
    )
    transmil_landmarks: int | None = Field(
        None, ge=1, le=65536, description="transmil: landmarks of nystrom; null: embed_dim / 2"
    )


class LinearConfig(Section):
    """The baseline linear."""

    l1_ratio: float = Field(0.5, ge=0, le=1, description="linear: L1's share of the elastic net; 0: all L2")
    path_end: float = Field(
        0.01,
        gt=0,
        le=1,
        description="linear: the last epoch's penalty, of that at which all weights are 0",
    )


class DualStreamConfig(Section):
    """The dual-stream head."""

    use_hidden_layer: bool = Field(True, description="dual_stream: project the features first")
    hidden_dim: int = Field(256, ge=1, le=65536, description="dual_stream: width of that layer")
    attention_dim: int = Field(
        128, ge=1, description="dual_stream: width of queries, keys and score layer; dsmil: of queries"
    )
    attention_type: Literal["gated", "cosine", "dsmil", "abmil"] = Field(
        "gated", description="dual_stream: gated | cosine | dsmil | abmil"
    )
    fusion_method: Literal["concat", "weighted", "cross_attn"] = Field(
        "concat", description="dual_stream: concat | weighted | cross_attn"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout wherever none is set apart")
    temperature_start: float = Field(
        10.0, gt=0, description="dual_stream: temperature of the selection in the first epoch"
    )
    temperature_end: float = Field(
        1.0, gt=0, description="dual_stream: in the last epoch and in evaluation; never below"
    )
    temperature_schedule: Literal["linear", "cosine", "exponential"] = Field(
        "linear", description="dual_stream: linear | cosine | exponential"
    )


class HeadConfig(
    DualStreamConfig, LinearConfig, TransMILConfig, DsmilConfig, ClamConfig, HierarchicalConfig
):
    """Which head learns, and its settings; each head reads its own."""

    name: str = Field(
        "hierarchical",
        description="hierarchical | dual_stream | abmil | gated_abmil | dsmil | clam_sb | transmil | "
        "mean | max | linear, or one that head.plugin registers",
        json_schema_extra={"alias": "model"},
    )
    plugin: str | None = Field(
        None,
        description="Python file that registers a head or a loss of your own",
        json_schema_extra=PATH,
    )
    options: dict[str, Any] = Field({}, description="settings of a head of your own: {name: value}")
