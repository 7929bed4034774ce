"""The configuration of a run: frozen dataclasses, YAML presets, `--section.key value` overrides; saved with the run.

Every value has a type and a range; an unknown key and a value of the wrong type or range are each one sentence.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from .._files import write_atomic
from .._keys import did_you_mean, flatten

PRESETS = Path(__file__).resolve().parent.parent / "configs"
MOST = 2**31 - 1
MOST_EPOCHS = 10**6
MOST_SEED = 10**9  # k-means adds the epoch to it, and FAISS takes 32 bits
LIBRARIES = ("torchvision:", "timm:")  # of encoders by name
STAGES = ("simclr", "stage1", "stage2", "joint")
OLD_PRESETS = {"cifar10_lt_hour": "cifar10_lt_small"}  # name in saved commands and results -> name today


class ConfigError(ValueError):
    """A sentence about one key of the configuration."""


def _number(default: float, low: float = 0, high: float | None = None) -> Any:
    """`high` None: no bound for a number, MOST for an integer, which goes into 32 bits somewhere."""
    if high is None:
        high = MOST if isinstance(default, int) else math.inf
    return field(default=default, metadata={"low": low, "high": high})


def _choice(default: str, *others: str, prefixes: tuple[str, ...] = ()) -> Any:
    """`prefixes`: any name after one of them is allowed, too."""
    return field(default=default, metadata={"choices": (default, *others), "prefixes": prefixes})


def _list_of(default: str, *others: str) -> Any:
    return field(default=(default,), metadata={"items": (default, *others)})


@dataclass(frozen=True)
class DataConfig:
    """Which images: see `ltood_fast.data.load_data` for the specification strings."""

    id: str = "digits"  # long-tailed in-distribution set, its labels unused in training
    ood: str = "letters"  # out-of-distribution pool; empty: none
    root: str = ""  # folder that relative paths refer to
    ood_root: str = ""  # the same for the OOD set; empty: root
    id_list: str = ""  # `path label` lists, for sets of the kind `list`
    ood_list: str = ""  # the same of the OOD pool; labels are for the report
    probe_list: str = ""  # balanced labelled set of the linear probe
    test_list: str = ""  # balanced labelled set that is tested on
    few_shot_list: str = ""  # of the few-shot probe; or .npy indices of the probe set; empty: see eval.few_shot
    split: str = ""  # official .npy index split of the ID set
    probe_split: str = ""  # the same of the linear probe's training set; empty: the whole training part
    test_fraction: float = _number(0.2, 0.01, 0.9)  # of each class, of a folder that has no test part
    imbalance: float = _number(0.0)  # largest class / smallest class, exponential in between; 0 or 1: unchanged
    class_order: str = _choice("fixed", "shuffled")  # [ltood_fast] large classes: by number, or drawn from the seed
    image_size: int = _number(32, 4, 1024)  # pixels of a view
    # side of the squares that files are decoded to and views are cropped from; evaluation sees their middle. 256 with
    # an image_size of 224 is the baselines' evaluation; their crops come from the whole image. 0: image_size
    decode_size: int = _number(0, 0, 2048)
    cache_dir: str = ""  # where decoded sets are kept; empty: under the user's cache folder
    on_device: str = _choice("auto", "always", "never")  # images as uint8 on the training device; auto: a GPU with room
    workers: int = _number(
        0, 0, 1024
    )  # processes that decode sets over 2 GiB as they are used; 0: decoded once, cached
    ood_size: int = _number(0)  # images to render or to keep at most; 0: all
    seed: int = _number(0, 0, MOST_SEED)  # of the imbalance's and the pool's random choices


@dataclass(frozen=True)
class AugmentConfig:
    """SimCLR's augmentation; the defaults are the source's for CIFAR."""

    crop_min: float = _number(0.1, 0.01, 1.0)  # smallest part of the area that a random resized crop keeps
    crop_max: float = _number(1.0, 0.01, 1.0)  # largest part of it
    flip: float = _number(0.5, 0, 1)  # probability of a horizontal flip
    rotate: float = _number(0.0, 0, 180)  # [ltood_fast] degrees at most, for sets without colour such as digits
    shift: float = _number(0.0, 0, 0.5)  # [ltood_fast] share of the image's side at most
    jitter: float = _number(0.4, 0, 1)  # strength for brightness, contrast, saturation; hue a quarter of it
    jitter_p: float = _number(0.8, 0, 1)  # probability of the colour jitter
    gray_p: float = _number(0.2, 0, 1)  # probability of a grey view
    blur_p: float = _number(0.0, 0, 1)  # probability of a blurred view; 0.5 for ImageNet


@dataclass(frozen=True)
class ModelConfig:
    encoder: str = _choice(  # one of these, or any network of torchvision or timm without its classifier
        "resnet18", "resnet50", "small_resnet", "tiny_conv", prefixes=LIBRARIES
    )
    init: str = ""  # weights that training starts from: a file, or timm for timm's pretrained ones; empty: random
    stem: str = _choice("cifar", "imagenet")  # resnet18/50: 3x3 stride 1 without pooling, or 7x7 stride 2 with it
    width: int = _number(24, 1, 4096)  # small_resnet, tiny_conv: channels of the first stage
    hidden: int = _number(512, 1, 65536)  # width of the projection head
    out: int = _number(128, 1, 65536)  # width of the embeddings that the losses compare
    channels_last: bool = False  # memory layout of images and weights; faster on most devices
    sync_batchnorm: bool = True  # [ltood_fast] on several ranks: BatchNorm over the batch of all of them


@dataclass(frozen=True)
class OptimConfig:
    name: str = _choice("sgd", "adamw")  # optimiser
    batch_size: int = _number(512, 2)  # images of all ranks; twice as many views
    micro_batch: int = _number(0)  # [ltood_fast] images of a rank in memory at a time, see grad_cache; 0: all
    lr: float = _number(0.5)  # highest rate, after the warm-up; 0.5 for a batch of 512 [paper]
    momentum: float = _number(0.9, 0, 1)  # of sgd
    weight_decay: float = _number(1e-4)  # of all parameters [paper]
    warmup_epochs: int = _number(10)  # linear to lr, then cosine to min_lr
    min_lr: float = _number(1e-6)  # rate at the end [paper]
    # progress of the cosine in finished epochs, however long, or in steps as the baselines count them: then longer
    # epochs, with OOD images, take a larger part of it
    schedule: str = _choice("epochs", "steps")
    last_batch: str = _choice("drop", "keep")  # images that do not fill a batch: left out, or a smaller batch


@dataclass(frozen=True)
class BaseConfig:
    """The second view that the stages simclr, stage1 and joint compare a view with, see `train.sdclr`, and how warm.

    `temperature_schedule` cosine [Kukleva 2023]: in epoch t their temperature is low + (high - low) (1 + cos(2 pi t /
    period)) / 2, in place of the stages' own constant one.
    """

    name: str = _choice("simclr", "sdclr")  # sdclr: the second view goes through a pruned competitor [Jiang 2021]
    prune: float = _number(0.9, 0, 1)  # share of weights that it lacks: 0.9 on CIFAR, 0.3 on ImageNet-100 [Jiang 2021]
    temperature_schedule: str = _choice("constant", "cosine")  # constant: the stages' own
    temperature_low: float = _number(0.1, 1e-3)  # [Kukleva 2023]
    temperature_high: float = _number(1.0, 1e-3)  # [Kukleva 2023]
    temperature_period: int = _number(400, 1)  # [ltood_fast] epochs from the highest to the highest again


@dataclass(frozen=True)
class SimCLRConfig:
    """The baseline: instance discrimination on the ID set alone."""

    epochs: int = _number(2000, 1, MOST_EPOCHS)  # of this stage [paper]
    temperature: float = _number(0.2, 1e-3)  # of the softmax [paper]


@dataclass(frozen=True)
class Stage1Config:
    """ID and sampled OOD images, L_PSD + alpha L_DD.

    `neighbor_weighting`, judged at each re-sampling among all images of a domain that are trained on: `density`, lam
    falls linearly with the rank of the sparsity, from lam to 0; `gate`, the densest `gate` keep lam, the others get 0;
    `mutual`, an image keeps lam if it is the nearest of its nearest image, whatever `neighbors` is.
    """

    epochs: int = _number(2000, 1, MOST_EPOCHS)  # of this stage, warm-up included [paper]
    init: str = _choice("scratch", "simclr")  # [ltood_fast] simclr: go on from that stage's weights
    init_from: str = (
        ""  # [ltood_fast] checkpoint of another run to start from: branches from one trunk; empty: see init
    )
    temperature: float = _number(0.2, 1e-3)  # of the softmax [paper]
    alpha: float = _number(0.3)  # weight of the domain loss L_DD [paper]
    k: int = _number(1, 1)  # neighbours that are positives
    warmup_epochs: int = _number(100)  # NT-Xent on ID alone before the first sampling
    resample_every: int = _number(25, 1)  # T, epochs [paper]
    budget: int = _number(10000, 1)  # N_b, OOD images [paper]
    ood_strategy: str = _choice("tailness", "random", "none")  # how OOD images are chosen; none: ID images alone
    targets: str = _choice("clusters", "samples")  # [ltood_fast] OOD images must be near to these, see choose_ood
    target_samples: int = _number(256, 1)  # [ltood_fast] how many of the sparsest ID images are targets
    clusters: int = _number(10, 1)  # of the ID images, which share the budget [Bai 2023]
    tailness_k: int = _number(10, 1)  # neighbours of the density, or largest probabilities of the momentum score
    tailness: str = _choice("sparsity", "momentum")  # of an ID image; momentum: COLT's, see methods.colt_tailness
    tailness_momentum: float = _number(0.97, 0, 1)  # of the last epochs' score [Bai 2023]
    budget_temperature: float = _number(1.0, 1e-3)  # [ltood_fast] T_c; smaller: more for the sparsest clusters
    refine_steps: int = _number(100)  # [ltood_fast] KL refinement of the k-means centroids; 0: plain k-means
    refine_lr: float = _number(0.1)  # [ltood_fast] rate of that refinement
    refine_batch: int = _number(
        0
    )  # rows of a step, as L_cluster is a mean over a minibatch [paper]; 0 [ltood_fast]: all
    refine_nu: float = _number(1.0, 1e-3)  # the parameter in the denominator of q [paper]; 1: DEC's [ltood_fast]
    # [ltood_fast] which embeddings are clustered and searched: a choice, as the source says "extracted by f" and no
    # more; COLT takes the normalised projections
    cluster_space: str = _choice("features", "projection")
    # [ltood_fast] where the neighbours of a row come from; oracle: the nearest of the row's class in the batch, by the
    # labels, which is no method but the positive control of experiments
    neighbors: str = _choice("in_batch", "queue", "dataset", "oracle")
    queue_size: int = _number(4096, 1)  # rows of the queue
    # [ltood_fast] when neighbours of the data set are embedded anew, with their weights; epoch: one pass more of the
    # network over the ID images and the chosen OOD ones an epoch
    bank_renewal: str = _choice("resampling", "epoch")
    pairing: str = _choice("same", "cross")  # [ltood_fast] a view and its neighbour, or the other view's: see psd_loss
    neighbor_start_epoch: int = _number(0)  # [ltood_fast] before it neighbours weigh nothing
    ood_neighbors: bool = True  # [ltood_fast] whether OOD images have neighbours as positives
    same_domain: bool = True  # neighbours from the own domain only
    neighbor_weight: float = _number(1.0)  # [ltood_fast] lam, weight of the pseudo-positives; 0: none
    neighbor_weighting: str = _choice("none", "density", "gate", "mutual")  # [ltood_fast] who keeps lam, see above
    gate: float = _number(0.4, 0, 1)  # [ltood_fast] share of the densest images that do


@dataclass(frozen=True)
class Stage2Config:
    """ID images alone, guided by the frozen network of stage 1."""

    guide: str = ""  # [ltood_fast] checkpoint of the network that guides; empty: the one of this run's stage 1
    epochs: int = _number(500, 1, MOST_EPOCHS)  # of this stage [paper]
    temperature: float = _number(0.2, 1e-3)  # of the softmax [paper]
    lr_scale: float = _number(1.0)  # [ltood_fast] times optim.lr, as the student starts trained
    beta: float = _number(0.4)  # weight of the distillation [paper]
    distill: str = _choice("relational", "feature")  # [ltood_fast] similarities or features are distilled
    k: int = _number(5, 1)  # [ltood_fast] positives that the guide chooses
    weighted: bool = True  # similarity sets the forces [paper]
    gamma: float = _number(1.0)  # [ltood_fast] exponent of the forces
    clusters: int = _number(10, 1)  # of the guide's features, which choose negatives
    guide_views: str = _choice("augmented", "clean")  # [ltood_fast] the guide sees the student's views, or images


@dataclass(frozen=True)
class EvalConfig:
    """Linear probes and kNN on frozen features."""

    probe: str = _choice("logistic", "sgd")  # sgd: the source's protocol; logistic [ltood_fast]: without a rate
    # sgd alone: the probe learns from crops and flips drawn anew each epoch, and the epoch that is best on held-out
    # images counts [SDCLR, COLT]; a pass of the network over the probe set an epoch
    probe_augment: bool = False
    probe_batch: int = _number(128, 1)  # sgd: images; 512 on ImageNet [COLT]
    few_shot: int = _number(0)  # images a class of a second probe, which learns from these alone; 0: none
    knn_k: int = _number(20, 1)  # neighbours of the kNN classifier; cut to the size of the probe set
    groups: str = _choice("rank", "count")  # rank: 4/3/3 classes as on CIFAR-10; count: 100 and 20 images


@dataclass(frozen=True)
class RunConfig:
    device: str = _choice("auto", "cpu", "cuda")  # auto: the GPU where there is one
    # of the network; the losses are float32. auto: bf16-mixed where the device computes it in hardware, else 32-true,
    # as a processor without bf16 instructions is much slower with bf16-mixed
    precision: str = _choice("32-true", "bf16-mixed", "auto")
    threads: int = _number(0, 0, 1024)  # of the CPU; 0: torch's own choice
    checkpoint_every: int = _number(1, 1)  # epochs
    timeout: float = _number(600.0, 1)  # seconds a rank waits for another one before the run ends
    progress: bool = True  # bars of training, decoding and embedding
    loggers: tuple[str, ...] = _list_of("tensorboard", "csv", "wandb", "mlflow", "none")  # of history.jsonl's values
    report_every: float = _number(60.0)  # seconds between two pages report.html while training; 0: at the end alone


@dataclass(frozen=True)
class Config:
    seed: int = _number(0, 0, MOST_SEED)  # of weights, views, the order of images and k-means
    stages: tuple[str, ...] = ("simclr", "stage1", "stage2")  # trained one after the other; joint: all losses in one
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    simclr: SimCLRConfig = field(default_factory=SimCLRConfig)
    stage1: Stage1Config = field(default_factory=Stage1Config)
    stage2: Stage2Config = field(default_factory=Stage2Config)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)


@functools.cache
def known_keys() -> dict[str, tuple[dataclasses.Field, Any]]:
    """Every key as `section.key` (or `key` at the top) with its field and type."""
    keys = {}
    for section, kind in get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            types = get_type_hints(kind)
            keys.update({f"{section}.{f.name}": (f, types[f.name]) for f in dataclasses.fields(kind)})
    top = get_type_hints(Config)
    keys.update({f.name: (f, top[f.name]) for f in dataclasses.fields(Config) if f.name in ("seed", "stages")})
    return keys


def _unknown(key: str, keys: list[str]) -> ConfigError:
    if inside := [name for name in keys if name.startswith(f"{key}.")]:
        return ConfigError(f"config: key must be one of the section {key} ({', '.join(inside)}), got {key!r} itself")
    return ConfigError(f"config: key must be a known one, got {key!r}{did_you_mean(key, keys, cutoff=0.4)}")


def _parse(key: str, kind: Any, value: Any) -> Any:
    """A YAML value or a command-line string as the type of its field."""

    def wrong(allowed: str) -> ConfigError:
        got = value if isinstance(value, datetime.date) else repr(value)
        return ConfigError(f"config: {key} must be {allowed}, got {got}")

    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if isinstance(value, bool):
            return value
        raise wrong("true or false")
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise wrong("an integer" if kind is int else "a number")
        if kind is int and isinstance(value, float):
            raise wrong("an integer")
        try:
            return kind(value)
        except ValueError:
            raise wrong("an integer" if kind is int else "a number") from None
    if get_origin(kind) is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, get_args(kind)[0]) for item in items):
            raise wrong("a list of names")
        return tuple(item.strip() for item in items)
    if not isinstance(value, str):
        raise wrong("a string")
    return value


def _check_range(key: str, f: dataclasses.Field, value: Any) -> None:
    if (choices := f.metadata.get("choices")) and value not in choices:
        prefixes = f.metadata["prefixes"]
        if not any(value.startswith(prefix) and len(value) > len(prefix) for prefix in prefixes):
            allowed = ", ".join((*choices, *(f"{prefix}NAME" for prefix in prefixes)))
            raise ConfigError(f"config: {key} must be one of {allowed}, got {value!r}")
    if (items := f.metadata.get("items")) and (not value or set(value) - set(items) or len(set(value)) < len(value)):
        got = ",".join(value) or "nothing"
        raise ConfigError(f"config: {key} must be some of {', '.join(items)}, each once, got {got!r}")
    if "low" in f.metadata and not f.metadata["low"] <= value <= f.metadata["high"]:
        low, high = f.metadata["low"], f.metadata["high"]
        allowed = (
            f"at least {low:g}" if high == math.inf or (high == MOST and not value > high) else in_range(low, high)
        )
        raise ConfigError(f"config: {key} must be {allowed}, got {value}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"config: {key} must be finite, got {value}")


def in_range(low: float, high: float) -> str:
    return f"in [{low:.10g}, {high:.10g}]"


def _check_together(config: Config) -> None:
    """The rules that bind two keys."""

    def require(condition: bool, key: str, allowed: str, got: object, must: str = "be") -> None:
        if not condition:
            raise ConfigError(f"config: {key} must {must} {allowed}, got {got}")

    order, stages = [STAGES.index(s) for s in config.stages if s in STAGES], ",".join(config.stages) or "none"
    sorted_subset = len(order) == len(config.stages) and order == sorted(set(order))
    require(bool(order) and sorted_subset, "stages", f"some of {', '.join(STAGES)} in that order", stages)
    guided = "stage1" in config.stages or config.stage2.guide
    require("stage2" not in config.stages or bool(guided), "stages",
            "stage1, the guide of stage2, unless stage2.guide names a checkpoint", stages, must="hold")  # fmt: skip
    s1 = config.stage1
    require(s1.init == "scratch" or "simclr" in config.stages, "stage1.init", "scratch without stage simclr", s1.init)
    require(not s1.init_from or s1.init == "scratch", "stage1.init_from", "empty with stage1.init simclr", s1.init_from)
    require(s1.warmup_epochs <= s1.epochs, "stage1.warmup_epochs", f"at most stage1.epochs = {s1.epochs}",
            s1.warmup_epochs)  # fmt: skip
    by_momentum = s1.tailness == "momentum" and s1.ood_strategy == "tailness"
    require(not by_momentum or s1.warmup_epochs > 0, "stage1.warmup_epochs",
            "at least 1 with stage1.tailness momentum, which scores what was trained on", 0)  # fmt: skip
    loggers = config.run.loggers
    require(loggers == ("none",) or "none" not in loggers, "run.loggers", "none alone, or others", ",".join(loggers))
    b = config.base
    require(b.temperature_low <= b.temperature_high, "base.temperature_low",
            f"at most base.temperature_high = {b.temperature_high}", b.temperature_low)  # fmt: skip
    d, a = config.data, config.augment
    require(d.decode_size == 0 or d.decode_size >= d.image_size, "data.decode_size",
            f"0 or at least data.image_size = {d.image_size}", d.decode_size)  # fmt: skip
    encoder, init = config.model.encoder, config.model.init
    require(init != "timm" or encoder.startswith("timm:"), "model.init", "a file for an encoder that is not timm:NAME",
            init)  # fmt: skip
    require(a.crop_min <= a.crop_max, "augment.crop_min", f"at most augment.crop_max = {a.crop_max}", a.crop_min)


def parse_key(key: str, value: Any) -> Any:
    """The value of a key in its type and range."""
    keys = known_keys()
    if key not in keys:
        raise _unknown(key, list(keys))
    f, kind = keys[key]
    parsed = _parse(key, kind, value)
    _check_range(key, f, parsed)
    return parsed


def from_dict(values: dict[str, Any]) -> Config:
    """A checked Config of `{"section.key": value}`; what is not named keeps its default."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, {})[name] = parse_key(key, value)
    top = sections.pop("", {})
    types = get_type_hints(Config)
    config = Config(**top, **{section: types[section](**fields) for section, fields in sections.items()})
    _check_together(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values: what YAML and a checkpoint hold."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(name_or_path: str, overrides: dict[str, Any] | None = None) -> Config:
    """A preset by name or a YAML file by path, with `{"section.key": value}` on top, values also as strings.

    Raises:
        ConfigError: the file is missing or no YAML mapping; a key is unknown, a value of the wrong type or range.
    """
    return from_dict({**config_values(name_or_path), **(overrides or {})})


def config_values(name_or_path: str) -> dict[str, Any]:
    """`{"section.key": value}` of a preset or YAML file, each value checked by itself.

    Raises:
        ConfigError: as `load_config`.
    """
    path = PRESETS / f"{OLD_PRESETS.get(name_or_path, name_or_path)}.yaml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        hint = did_you_mean(name_or_path, presets())
        raise ConfigError(
            f"config: config must be a preset ({', '.join(presets())}) or a YAML file, got {name_or_path!r}{hint}"
        )
    values = _read_file(path)
    try:
        for key, value in values.items():
            parse_key(key, value)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {path})") from None
    return values


def _read_file(path: Path) -> dict[str, Any]:
    """`{"section.key": value}` of a YAML file.

    Raises:
        ConfigError: it is no mapping of sections, or names a key twice (YAML's readers take the last one).
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value]
            if twice := [name for name in names if isinstance(name, str) and names.count(name) > 1]:
                raise ConfigError(f"config: {path} must name a key once, got {twice[0]!r} twice")
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} must be YAML, got {' '.join(str(error).split())}") from None
    if values is not None and not isinstance(values, dict):
        kind = {list: "a list", str: "plain text"}.get(type(values), "a single value")
        raise ConfigError(f"config: {path} must hold sections of keys, got {kind}")
    sections = {key.partition(".")[0] for key in known_keys() if "." in key}
    # A section whose keys are all commented out is null.
    return flatten({key: value for key, value in (values or {}).items() if value is not None or key not in sections})


def save_config(config: Config, path: Path) -> None:
    import yaml

    write_atomic(path, yaml.safe_dump(to_dict(config), sort_keys=False).encode())


def _binding(values: dict[str, Any]) -> dict[str, Any]:
    """The keys that decide what the weights become; the others (where it runs, how it is evaluated) may change."""
    flat = flatten(values)
    free = ("eval.", "run.", "data.few_shot_list", "data.on_device", "data.workers")
    return {key: flat[key] for key in flat if key == "run.precision" or not key.startswith(free)}


def differing_keys(mine: Config, theirs: dict[str, Any], stage: str | None = None) -> list[str]:
    """The keys that must not differ from a saved configuration, and do.

    Args:
        theirs: the saved one. A key that it lacks is newer than the run and has its default, which is what the run did.
        stage: only keys that the weights of this stage depend on; its epochs are free, as a stage may get more.
    """
    a, b = _binding(to_dict(mine)), {**_binding(to_dict(Config())), **_binding(theirs)}
    keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    return keys if stage is None else [key for key in keys if _reads(stage, key)]


def is_binding(key: str) -> bool:
    """Whether the weights of a stage may depend on a key."""
    return bool(_binding({key: None}))


POOL_KEYS = ("data.ood", "data.ood_root", "data.ood_list", "data.ood_size")
# These keys shape the guide's clusters too.
CLUSTER_KEYS = ("stage1.refine_steps", "stage1.refine_lr", "stage1.refine_batch", "stage1.refine_nu")


def _reads(stage: str, key: str) -> bool:
    """Whether the weights of a stage, after some number of epochs, depend on a key that is binding for the run."""
    with_ood = stage in ("stage1", "joint")
    section = key.partition(".")[0]
    if key == "stages" or key == f"{'stage1' if with_ood else stage}.epochs":
        return False
    if key in POOL_KEYS:
        return with_ood
    if section == "base":
        return stage != "stage2"
    if section == "simclr":
        return stage == "simclr"
    if section == "stage1":
        return with_ood or (stage == "stage2" and key in CLUSTER_KEYS)
    if section == "stage2":
        own = ("stage2.guide", "stage2.epochs", "stage2.lr_scale")
        return stage == "stage2" or (stage == "joint" and key not in own)
    return True


def start_of(stage: str, config: Config) -> str | None:
    """The stage of the same run whose weights a stage starts from."""
    if stage == "stage2":
        return None if config.stage2.guide else "stage1"
    return "simclr" if stage in ("stage1", "joint") and config.stage1.init == "simclr" else None
