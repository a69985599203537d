"""What names of other libraries are called here, for those who look for them."""

from __future__ import annotations

from collections.abc import Collection

OTHER_HETU = {
    "AdamOptimizer": "hetu.optim.Adam or hetu.optim.AdamW",
    "AutoCast": "hetu.autocast",
    "CommGroup": "the groups of a hetu.Strategy",
    "ConstantInitializer": "a number as hetu.parameter's init",
    "DARExecutor": "g.run",
    "DataLoader": "torch.utils.data.DataLoader",
    "Dataloader": "torch.utils.data.DataLoader",
    "DeviceGroup": "a hetu.Strategy, whose pipelines are ranks",
    "DeviceGroupHierarchy": "hetu.graph(..., strategies=[...])",
    "DeviceGroupList": "hetu.graph(..., strategies=[...])",
    "DistributedStates": "a hetu.Strategy, which says who holds which tokens",
    "DistributedStatesHierarchy": "hetu.graph(..., strategies=[...])",
    "DistributedStatesUnion": "hetu.graph(..., strategies=[...])",
    "Executor": "g.run",
    "GradScaler": "bfloat16 under hetu.autocast, which needs no scaling",
    "Initializer": "a function of the tensor as hetu.parameter's init",
    "NDArray": "numpy arrays and torch tensors",
    "NormalInitializer": "a function of the tensor as hetu.parameter's init",
    "Operator": "hetu.op, which makes an op of a function of torch",
    "Profile": "hetu.trace",
    "RunContext": "the arguments of g.run",
    "SGDOptimizer": "hetu.optim.SGD",
    "SubGraph": "names of ops, name=",
    "TruncatedNormalInitializer": "a function of the tensor as hetu.parameter's init",
    "UniformInitializer": "a function of the tensor as hetu.parameter's init",
    "Variable": "hetu.parameter",
    "XavierUniformInitializer": "a function of the tensor as hetu.parameter's init",
    "add_to_subgraph": "names of ops, name=",
    "array_reshape": "hetu.reshape",
    "array_set": "hetu.full",
    "as_strided": "hetu.slice, hetu.transpose and hetu.reshape",
    "attn": "hetu.attn_varlen",
    "attn_qkvpacked": "hetu.split, and hetu.attn_varlen",
    "attn_varlen_qkvpacked": "hetu.split, and hetu.attn_varlen",
    "avgpool": "hetu.op(torch.nn.functional.avg_pool2d, ...)",
    "batch_matmul": "hetu.matmul",
    "batch_norm": "hetu.op(torch.nn.functional.batch_norm, ...)",
    "binary_cross_entropy": "hetu.op(torch.nn.functional.binary_cross_entropy, ...)",
    "bmm": "hetu.matmul",
    "broadcast": "hetu.broadcast_to",
    "buffer_to_NDArray": "the array itself",
    "ceil": "-hetu.floor(-x)",
    "checknumeric": "torch.isfinite on what a run gives",
    "checkpoint": "hetu.save and hetu.load",
    "comm": "the strategy's lists of hetu.parallel_attn, and hetu.all_reduce",
    "context": 'a device for the whole graph: hetu.graph(..., device="cuda")',
    "contiguous": "nothing: tensors need no such call",
    "control_dependencies": "nothing: what is fetched says what is computed",
    "conv2d": "hetu.op(torch.nn.functional.conv2d, ...)",
    "cpu_offload": "hetu.recompute",
    "cross_entropy_sparse": "hetu.cross_entropy",
    "crossentropy_sparse": "hetu.cross_entropy",
    "data": "torch.utils.data",
    "data_transfer": "hetu.cast",
    "dequantization": "hetu.op with a library's own function",
    "detach": "hetu.stop_gradient",
    "device": 'a string: hetu.graph(..., device="cuda")',
    "diagonal": "hetu.op(torch.diagonal, ...)",
    "dot": "hetu.sum(x * y)",
    "dropout2d": "hetu.op, or hetu.dropout",
    "dtype": "hetu.as_dtype, and the types by name: hetu.float32",
    "dynamic_concat": "hetu.concat",
    "einsum": "hetu.op(torch.einsum, ...), or hetu.matmul",
    "elu": "hetu.op(torch.nn.functional.elu, ...)",
    "embedding_lookup": "hetu.embedding",
    "empty": "hetu.full",
    "empty_like": "hetu.full(x.symbolic_shape, 0.0)",
    "engine": "a loop around g.run, and hetu.plan_batch for its batches",
    "flash_attn": "hetu.attn_varlen or hetu.parallel_attn",
    "float4": "hetu.op with a library's own function",
    "from_buffer": "hetu.constant",
    "from_numpy": "hetu.constant",
    "from_numpy_parallel": "hetu.constant",
    "full_like": "hetu.full(x.symbolic_shape, value)",
    "fused_layernorm": "hetu.layer_norm",
    "fused_rmsnorm": "hetu.rms_norm",
    "global_comm_barrier_mpi": "nothing: runs wait for each other where they must",
    "global_comm_barrier_rpc": "nothing: runs wait for each other where they must",
    "global_device_group": "hetu.init_distributed, which returns the world",
    "gpu": 'a device for the whole graph: hetu.graph(..., device="cuda")',
    "group": "a list of fetches",
    "hardshrink": "hetu.op(torch.nn.functional.hardshrink, ...)",
    "hardsigmoid": "hetu.op(torch.nn.functional.hardsigmoid, ...)",
    "hardswish": "hetu.op(torch.nn.functional.hardswish, ...)",
    "hardtanh": "hetu.op(torch.nn.functional.hardtanh, ...)",
    "index_add_": "hetu.op(torch.index_add, ...)",
    "init": "a function of the tensor as hetu.parameter's init",
    "init_comm_group": "hetu.init_distributed",
    "instance_norm": "hetu.op(torch.nn.functional.instance_norm, ...)",
    "interpolate": "hetu.op(torch.nn.functional.interpolate, ...)",
    "kl_div": "hetu.op(torch.nn.functional.kl_div, ...)",
    "layernorm": "hetu.layer_norm",
    "leakyrelu": "hetu.op(torch.nn.functional.leaky_relu, ...)",
    "local_device": "hetu.init_distributed, which returns the world with its device",
    "logsigmoid": "hetu.op(torch.nn.functional.logsigmoid, ...)",
    "map_to_local_data": "layout.scatter",
    "matmul2": "hetu.matmul",
    "matmul4bit": "hetu.op with a library's own function",
    "maxpool": "hetu.op(torch.nn.functional.max_pool2d, ...)",
    "merge_strategy": "hetu.graph(..., strategies=[...])",
    "mish": "hetu.op(torch.nn.functional.mish, ...)",
    "models": "hetu.nn, or a model of transformers with hetu's attention",
    "mse_loss": "hetu.op(torch.nn.functional.mse_loss, ...)",
    "ndarray": "numpy arrays and torch tensors",
    "neg": "-x",
    "nfloat4": "hetu.op with a library's own function",
    "nll_loss": "hetu.cross_entropy",
    "norm": "hetu.sqrt(hetu.sum(x * x))",
    "normal": "hetu.constant(torch.randn(...))",
    "numpy_to_NDArray": "the array itself",
    "onehot": "hetu.one_hot",
    "ones": "hetu.full(shape, 1.0)",
    "ones_initializer": "1.0 as hetu.parameter's init",
    "ones_like": "hetu.full(x.symbolic_shape, 1.0)",
    "operator": "hetu.op, which makes an op of a function of torch",
    "pad": "hetu.op(torch.nn.functional.pad, ...)",
    "parallel_parameter": "hetu.parameter",
    "parallel_placeholder": "hetu.placeholder",
    "peft": "hetu.functional in a PyTorch model, with the library peft around it",
    "profiler": "hetu.trace",
    "quantization": "hetu.op with a library's own function",
    "rand": "hetu.constant(torch.rand(...))",
    "rand_like": "hetu.constant(torch.rand(...))",
    "randn": "hetu.constant(torch.randn(...))",
    "randn_like": "hetu.constant(torch.randn(...))",
    "range_mask": "hetu.where",
    "reciprocal": "1 / x",
    "reduce": "hetu.sum, hetu.mean or hetu.max",
    "reduce_mean": "hetu.mean",
    "reduce_sum": "hetu.sum",
    "repeat": "hetu.op(torch.tile, ...)",
    "requires_grad_variables": "hetu.gradients or minimize, which find the parameters",
    "rmsnorm": "hetu.rms_norm",
    "roll": "hetu.op(torch.roll, ...)",
    "rpc": "torchrun, and hetu.init_distributed",
    "run_level": 'a string: g.run(..., run_level="update")',
    "set_seed": "hetu.manual_seed",
    "setup_logging": "HETU_DEBUG=1, or hetu.config(debug=1)",
    "sgd_update": "hetu.optim.SGD",
    "softmax_cross_entropy": "hetu.cross_entropy",
    "softmax_cross_entropy_sparse": "hetu.cross_entropy",
    "softmaxcrossentropy_sparse": "hetu.cross_entropy",
    "softplus": "hetu.op(torch.nn.functional.softplus, ...)",
    "softshrink": "hetu.op(torch.nn.functional.softshrink, ...)",
    "stream": "nothing: hetu chooses streams",
    "subgraph": "names of ops, name=",
    "triu": "hetu.op(torch.triu, ...)",
    "uint16": "hetu.int32",
    "uint32": "hetu.int64",
    "uint64": "hetu.int64",
    "utils": "hetu.Strategy for parallelism, and hetu.save and hetu.load for checkpoints",
    "variable": "hetu.parameter",
    "vocab_parallel_cross_entropy": "hetu.cross_entropy",
    "xavier_normal_initializer": "a function of the tensor as hetu.parameter's init",
    "zeros": "hetu.full(shape, 0.0)",
    "zeros_initializer": "0.0 as hetu.parameter's init",
    "zeros_like": "hetu.full(x.symbolic_shape, 0.0)",
}
"""What names of the Hetu of PKU's DAIR lab are called here."""


TORCHS = {
    "Adam": "hetu.optim.Adam",
    "AdamW": "hetu.optim.AdamW",
    "Linear": "hetu.nn.Linear",
    "SGD": "hetu.optim.SGD",
    "amax": "hetu.max",
    "amin": "hetu.min",
    "cat": "hetu.concat",
    "chunk": "hetu.split",
    "expand": "hetu.broadcast_to",
    "grad": "hetu.gradients",
    "permute": "x.permute",
    "scaled_dot_product_attention": "hetu.attn_varlen",
    "stack": "x.unsqueeze and hetu.concat",
    "tensor_split": "hetu.split",
    "unsqueeze": "x.unsqueeze",
    "view": "hetu.reshape",
}
"""What names of PyTorch are called here, where a graph has the same under another one."""

_PARALLEL = ("Column", "Row", "QKV", "Vocab", "Multi", "Parallel", "Ht")
_OF_NN = {
    "AvgPool2d": "hetu.op(torch.nn.functional.avg_pool2d, ...)",
    "BCELoss": "hetu.op(torch.nn.functional.binary_cross_entropy, ...)",
    "BatchNorm": "hetu.op(torch.nn.functional.batch_norm, ...)",
    "ConstantPad2d": "hetu.op(torch.nn.functional.pad, ...)",
    "Conv2d": "hetu.op(torch.nn.functional.conv2d, ...)",
    "CrossEntropyLoss": "hetu.cross_entropy",
    "Dropout": "hetu.dropout",
    "Dropout2d": "hetu.op, or hetu.dropout",
    "GELU": "hetu.gelu",
    "Identity": "the tensor itself",
    "InstanceNorm": "hetu.op(torch.nn.functional.instance_norm, ...)",
    "KLDivLoss": "hetu.op(torch.nn.functional.kl_div, ...)",
    "LayerNorm": "hetu.layer_norm",
    "LeakyReLU": "hetu.op(torch.nn.functional.leaky_relu, ...)",
    "LoRAModel": "hetu.functional in a PyTorch model, with the library peft around it",
    "MSELoss": "hetu.mean((x - y) * (x - y))",
    "MaxPool2d": "hetu.op(torch.nn.functional.max_pool2d, ...)",
    "ModuleDict": "a dict of modules",
    "ModuleList": "a list of modules",
    "NLLLoss": "hetu.cross_entropy",
    "NewGeLU": "hetu.gelu",
    "Parameter": "hetu.parameter",
    "ReLU": "hetu.relu",
    "Sequential": "calls one after the other",
    "SiLU": "hetu.silu",
    "Sigmoid": "hetu.sigmoid",
    "Softmax": "hetu.softmax",
    "Tanh": "hetu.tanh",
    "ZeroPad2d": "hetu.op(torch.nn.functional.pad, ...)",
    "functional": "hetu's ops: hetu.relu, hetu.softmax, ...",
    "init": "a function of the tensor as hetu.parameter's init",
    "modules": "hetu.nn itself",
}
"""What modules of PyTorch and of the other Hetu are called here, where ``hetu.nn`` has none of that name."""


def of_module(name: str, own: Collection[str]) -> str | None:
    """What a name that ``hetu`` does not have is called here, for an AttributeError.

    Args:
        name: What was asked for.
        own: The names that there are.

    Returns:
        The answer, or None if the name is nobody's.

    Example:
        >>> of_module("fused_rmsnorm", ["rms_norm"])
        'that name is of another Hetu: use hetu.rms_norm'
        >>> of_module("relu_", ["relu"])
        "nothing changes a graph's tensors in place: use hetu.relu"
    """
    if name in OTHER_HETU:
        return f"that name is of another Hetu: use {OTHER_HETU[name]}"
    if name in TORCHS:
        return f"use {TORCHS[name]}"
    for ending, why in (("_op", "that name is of another Hetu"), ("_", "nothing changes a graph's tensors in place")):
        stem = name.removesuffix(ending)
        instead = f"hetu.{stem}" if stem in own else OTHER_HETU.get(stem)
        if stem != name and instead is not None:
            return f"{why}: use {instead}"
    return None


def of_nn(name: str, own: Collection[str]) -> str | None:
    """What a module that ``hetu.nn`` does not have is called here. Arguments and value are those of :func:`of_module`.

    Example:
        >>> of_nn("HtMultiColumnParallelLinear", ["Linear"])
        'use hetu.nn.Linear, which knows no tensor parallelism'
    """
    if name in _OF_NN:
        return f"use {_OF_NN[name]}"
    plain = name
    for part in _PARALLEL:
        plain = plain.replace(part, "")
    if plain == name or plain not in {*own, *_OF_NN}:
        return None
    return f"use {_OF_NN.get(plain, f'hetu.nn.{plain}')}, which knows no tensor parallelism"
