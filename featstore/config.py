"""The settings of a project (`featstore.yaml`): what is allowed, and what each field means.

Everything that concerns data, backbone, extraction and store is here; the
sections of heads and training live in `heads/config.py`, and `cli.py` joins
the two. Reading and overriding files is in `featstore.settings`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue


def _as_text(value: object) -> object:
    """Ids and class codes are text everywhere; YAML reads a bare 38 as a number."""
    if isinstance(value, float):
        raise ValueError(f"text, such as an id; put it in quotes, as {value} may be written in many ways")
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _as_list(value: object) -> object:
    """`exclude: 38` means the same as `exclude: [38]`."""
    return [value] if isinstance(value, str | int) else value


Text = Annotated[str, BeforeValidator(_as_text)]
Texts = Annotated[list[Text], BeforeValidator(_as_list)]

# Marks settings that name a file or folder: as flags they start from the current folder. Some
# name a file or something else altogether (`weights: imagenet`).
PATH: dict[str, JsonValue] = {"path": True}
PERHAPS_PATH: dict[str, JsonValue] = {"path": "perhaps"}
# A folder that holds this file; a folder that happens to be named like a backbone is none.
PERHAPS_FOLDER: dict[str, JsonValue] = {"path": "perhaps", "holds": "backbone.json"}


class Section(BaseModel):
    """A section of the config: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class PatchesConfig(Section):
    """Where the patches are and how their names are read."""

    folder: str = Field(
        "patches", description="folder of PNG patches, searched at any depth", json_schema_extra=PATH
    )
    pattern: str | None = Field(
        None,
        description="regular expression for file names, with groups case, slice, stain, patch [x, y]",
    )
    geometry: str | None = Field(
        None,
        description="CSV of patch positions: x,y[,width,height] or x0,y0,…,x3,y3 (level-0 px)",
        json_schema_extra=PATH,
    )
    on_unparsed: Literal["stop", "skip"] = Field(
        "stop", description="what to do about names that cannot be read: stop | skip"
    )
    normalize_cases: bool = Field(True, description="numeric case ids: 038 is 38")
    normalize_slices: bool = Field(True, description="slice ids: unmatched2 is unmatched_2")


class ImagesConfig(Section):
    """How a file's bytes become pixels."""

    channel_order: Literal["rgb", "bgr"] = Field(
        "rgb", description="bgr if the files were written with red and blue swapped"
    )
    max_pixels: int = Field(
        100_000_000, ge=1, description="refuse larger images (width × height), from the header"
    )
    on_bad_image: Literal["stop", "skip"] = Field(
        "stop", description="what to do about files that cannot be decoded: stop | skip"
    )
    slides: str | None = Field(
        None,
        description="images of the slices, to show attention on: a folder of case_ID_SLICE_STAIN.jpg "
        "(png, tif, svs, …), or a CSV: case_id,slice_id,stain,path[,downsample]",
        json_schema_extra=PATH,
    )
    slides_downsample: float = Field(
        1.0,
        gt=0,
        description="level-0 pixels a pixel of these images; whole-slide files (svs, ndpi, …) say it "
        "themselves",
    )


class LabelsConfig(Section):
    """The table of labels, one row a case."""

    file: str | None = Field(
        None, description="CSV with a column of case ids and one of classes", json_schema_extra=PATH
    )
    case_column: str = Field("Case", description="name of the column of case ids")
    class_column: str = Field("Class", description="name of the column of classes")


class StoreConfig(Section):
    """Where the embeddings are kept."""

    path: str = Field("store", description="folder of the embedding store", json_schema_extra=PATH)
    format: Literal["hdf5", "zarr"] = Field("hdf5", description="file format of new parts: hdf5 | zarr")
    scratch: str | None = Field(
        None,
        description="folder on the node's own disk that the store is copied to before training reads "
        "it, e.g. $TMPDIR; null: none",
    )


class ImportConfig(Section):
    """What `featstore import` must know and foreign files do not say."""

    source_format: Literal[
        "auto", "clam", "trident", "stamp", "slideflow", "torchmil", "table", "vectors"
    ] = Field(
        "auto",
        description="auto | clam | trident | stamp | slideflow | torchmil | table | vectors",
        json_schema_extra={"alias": "from"},
    )
    map: str | None = Field(
        None,
        description="CSV with slide_id, case_id[, stain][, slice]: whose a bag is",
        json_schema_extra=PATH,
    )
    default_stain: str = Field("h&e", description="stain of bags for which the map says no other")
    encoder: str | None = Field(None, description="what made the features, if the files do not say")
    precision: Literal["keep", "float16", "float32"] = Field(
        "keep", description="dtype in the store: keep | float16 | float32"
    )
    patch_size: float | None = Field(None, gt=0, description="side of a patch in level-0 pixels")
    mpp: float | None = Field(None, gt=0, description="micrometres a level-0 pixel")
    on_bad: Literal["stop", "skip"] = Field(
        "stop", description="what to do about files that cannot be used: stop | skip"
    )


class BackboneConfig(Section):
    """The frozen network."""

    name: str = Field(
        "densenet121",
        description="densenet121 | resnet50 | timm:NAME | folder of one that was trained here, which "
        "brings weights, resize and pool with it",
        json_schema_extra=PERHAPS_FOLDER,
    )
    weights: str = Field(
        "imagenet",
        description="imagenet | path of a .safetensors or .pth file | random:SEED",
        json_schema_extra=PERHAPS_PATH,
    )
    resize: Annotated[int, Field(ge=8, le=4096)] | Literal["model", "native", "native32"] = Field(
        224,
        description="side in px of the resized whole patch; model: the model's own resize and crop; "
        "native: each patch at its own size; native32: sides rounded to multiples of 32",
    )
    pool: int = Field(1, ge=1, le=16, description="average the feature map over pool × pool cells")
    final_relu: bool = Field(True, description="DenseNet: apply the last ReLU before pooling")


class ExtractConfig(Section):
    """The one pass of all patches through the backbone."""

    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d{1,2})?)$", description="auto | cpu | cuda[:N]"
    )
    amp: Literal["auto", "bf16", "fp16", "off"] = Field(
        "auto",
        description="precision; auto: bf16 where the hardware has it, else float32 (CPU) or fp16 (GPU)",
    )
    runtime: Literal["auto", "torch", "openvino"] = Field(
        "auto", description="what computes; auto: OpenVINO on a CPU where it is installed, else torch"
    )
    compile: bool = Field(False, description="torch.compile the backbone: pays in long runs only")
    dtype: Literal["float16", "float32"] = Field("float16", description="dtype of stored embeddings")
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="patches a forward pass; auto: on a CPU 16, with PyTorch up to 128 small "
        "ones; on a GPU up to 512, by its memory",
    )
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="decoding threads; auto: one a core"
    )
    shard: str | None = Field(
        None,
        pattern=r"^(\d+|auto)/[1-9]\d*$",
        description="I/N: share I (from 0) of N; auto/N: I from the scheduler's array",
    )
    views: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = Field(
        "auto",
        description="cached views a patch: the plain one and K - 1 augmented ones; "
        "auto: as in the store, 1 in a new one",
    )
    view_seed: Annotated[int, Field(ge=0, lt=2**32)] | Literal["auto"] = Field(
        "auto", description="seed of the augmented views; auto: as in the store, 0 in a new one"
    )
    native_pixels: Annotated[int, Field(ge=1024)] | Literal["auto"] = Field(
        "auto",
        description="native sizes: refuse patches of more pixels than this; auto: by the free memory",
    )
    prune: bool = Field(False, description="drop embeddings whose PNG has vanished")
    part_mb: int = Field(256, ge=1, description="a part file is closed at about this size")
    part_seconds: float = Field(
        60.0, gt=0, description="a part file is closed at the first patch after this long"
    )


class SplitConfig(Section):
    """How the cases are split into training, validation and test."""

    folds: int | None = Field(
        None,
        ge=3,
        le=100,
        description="K folds: test = fold k, validation = fold k + 1; else one 60/20/20 split",
    )
    seed: int = Field(42, ge=0, lt=2**32, description="seed of the shuffling")
    path: str = Field("splits", description="folder of the split files", json_schema_extra=PATH)


class FeatstoreConfig(Section):
    """The sections that `featstore/` reads."""

    patches: PatchesConfig = PatchesConfig()
    images: ImagesConfig = ImagesConfig()
    labels: LabelsConfig = LabelsConfig()
    classes: dict[str, Texts] = Field(
        {}, description="name of each class and the raw codes it stands for, e.g. benign: [1]"
    )
    exclude: Texts = Field([], description="case ids left out of everything")
    groups: str | dict[str, Texts] | None = Field(
        None,
        description="cases that belong together: CSV with columns case,group, or name: [case, …]",
        json_schema_extra=PERHAPS_PATH,
    )
    stains: dict[str, Texts] = Field({}, description="further stains: name: [alias, …]")
    store: StoreConfig = StoreConfig()
    backbone: BackboneConfig = BackboneConfig()
    extract: ExtractConfig = ExtractConfig()
    imports: ImportConfig = ImportConfig()
    split: SplitConfig = SplitConfig()
