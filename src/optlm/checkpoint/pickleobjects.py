"""What a weight file's pickle may speak of: tensors, storages, containers and inert settings.

A global is a name (`Global`), never looked up. "Calling" one is possible for the functions that
describe tensors; classes of known settings objects give an inert `Opaque`. Every other global is
refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from optlm.errors import CheckpointError, Fault, UnsafeFileError


class BadPickleError(CheckpointError):
    """The bytes are no complete pickle, or one with operands of the wrong kind."""


@dataclass(frozen=True, kw_only=True)
class Global:
    """A name that the pickle refers to. It is never looked up."""

    name: str


@dataclass(kw_only=True, eq=False, repr=False)
class Opaque:
    """An object of a configuration class, as data."""

    type: Global
    arguments: object = ()
    state: object = None
    items: dict[Any, Any] = field(default_factory=dict)
    values: list[Any] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class StorageRef:
    """A run of numbers in another record of the file."""

    dtype: str
    key: str
    length: int  # items


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorRef:
    """A strided view of a storage, not yet checked against it; offset and strides in items."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


STORAGES = {
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.DoubleStorage": "F64",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
}
_REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
_REBUILD_WITH_STATE = "torch._utils._rebuild_parameter_with_state"
_REBUILD_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
_ORDERED_DICT = "collections.OrderedDict"
_EMULATED = {
    _REBUILD_TENSOR, _REBUILD_PARAMETER, _REBUILD_WITH_STATE, _REBUILD_FROM_TYPE, _ORDERED_DICT,
}  # fmt: skip

# Classes whose objects hold settings beside the weights. They become `Opaque`.
_INERT_NAMES = frozenset(
    """
    argparse.Namespace collections.Counter collections.defaultdict pathlib.PosixPath
    pathlib.Path pathlib.PurePosixPath typing.Any _codecs.encode builtins.bool
    builtins.bytes builtins.dict builtins.float builtins.int builtins.list builtins.object
    builtins.set builtins.str builtins.tuple builtins.frozenset builtins.bytearray
    numpy.dtype numpy.core.multiarray.scalar numpy._core.multiarray.scalar numpy.ndarray
    numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct torch.Size
    torch.device torch.dtype torch.Tensor torch.nn.parameter.Parameter torch.float16
    torch.float32 torch.float64 torch.bfloat16 torch.half torch.float torch.int64
    torch.int32 torch.uint8 torch.bool torch.int8 torch.int16 torch.strided
    torch.serialization._get_layout
    """.split()  # noqa: SIM905  (a list of 40 quoted names hides what is in it)
)
_INERT_PACKAGES = ("omegaconf.", "metaseq.", "fairseq.")


def is_plain_key(key: object) -> bool:
    """True for dictionary keys that hash in constant time and cannot be made to collide."""
    if isinstance(key, int):
        return -(2**63) <= key < 2**63
    return key is None or isinstance(key, (str, bytes, Global, Opaque))


def unsafe(what: str) -> UnsafeFileError:
    message = f"the pickle asks for {what}, which is not needed for weights; nothing was executed"
    fault = Fault(code="unsafe-pickle", where="pickle", message=message)
    return UnsafeFileError(message, faults=[fault])


def check_global(name: str) -> Global:
    """`name` as a `Global`.

    Raises:
        UnsafeFileError: it is not on the lists of this module.
    """
    known = name in _EMULATED or name in STORAGES or name in _INERT_NAMES
    if not known and not name.startswith(_INERT_PACKAGES):
        raise unsafe(f"the global {name[:200]!r}")
    return Global(name=name)


def apply(function: Global, arguments: tuple[Any, ...]) -> object:
    """What calling `function` would build, described."""
    if function.name == _REBUILD_TENSOR:
        return _tensor(arguments)
    if function.name in (_REBUILD_PARAMETER, _REBUILD_WITH_STATE):
        if not arguments or not isinstance(arguments[0], TensorRef):
            raise BadPickleError("the pickle makes a parameter of something that is not a tensor")
        return arguments[0]
    if function.name == _REBUILD_FROM_TYPE:
        rebuild, inner = (*arguments, None, None, None)[:3:2]
        if not isinstance(rebuild, Global) or rebuild.name != _REBUILD_TENSOR:
            raise BadPickleError("the pickle rebuilds a tensor in an unknown way")
        return _tensor(inner)
    if function.name == _ORDERED_DICT:
        if arguments:
            raise BadPickleError("the pickle gives an OrderedDict arguments")
        return {}
    return Opaque(type=function, arguments=arguments)


def _tensor(arguments: object) -> TensorRef:
    if not isinstance(arguments, tuple) or len(arguments) < 4:
        raise BadPickleError("the pickle describes a tensor with too few arguments")
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, StorageRef) or not _naturals((offset,)):
        raise BadPickleError("the pickle describes a tensor without a storage")
    if not _naturals(shape) or not _naturals(strides) or len(shape) != len(strides):
        raise BadPickleError("the pickle describes a tensor whose shape or strides are not sizes")
    return TensorRef(storage=storage, offset=offset, shape=shape, strides=strides)


def _naturals(values: object) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) <= 8
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def storage_of(persistent_id: object) -> StorageRef:
    """``("storage", class, key, device, length)``, the one form torch.save writes."""
    if not isinstance(persistent_id, tuple) or len(persistent_id) < 5:
        raise BadPickleError("the pickle refers to a record in an unknown form")
    kind, storage, key, _, length = persistent_id[:5]
    if kind != "storage" or not isinstance(storage, Global) or storage.name not in STORAGES:
        raise BadPickleError("the pickle refers to a record that is not a tensor storage")
    if not isinstance(key, str) or not _naturals((length,)):
        raise BadPickleError("the pickle refers to a storage without a key or length")
    return StorageRef(dtype=STORAGES[storage.name], key=key, length=length)
