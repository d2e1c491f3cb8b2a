"""Writing a module as an ONNX file or as a program of ``torch.export``."""
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .program import FACTS
from .subnet_modules import ElasticSubnet, Requirement

FORMATS = ('onnx', 'pt2')
LEAST_OPSET = 18  # of ONNX, that the exporter of torch translates to


def write_program(
        module: nn.Module,
        images: Tensor,
        path: str | os.PathLike,
        format: str,
        facts: dict[str, Any] | None = None,
        opset: int | None = None,
) -> None:
    """Write a module as a program that takes ``image`` [B, C, H, W] and returns ``logits`` [B, num_classes].

    Args:
        module: A module of images alone, such as a ``FixedSubnet``, in evaluation mode; or an ``ElasticSubnet``, whose
            program takes images of any size, and ``img_size`` and ``keep_rate`` too.
        images: Two images or more to trace it with [B, C, H, W]; the program takes any number of that size.
        path: The file.
        format: ``onnx`` or ``pt2``.
        facts: What the file is to say about itself; that of an ONNX file gains its ``opset``.
        opset: Version of ONNX's operators, ``LEAST_OPSET`` or later, for the oldest runtimes that know it (default:
            that of torch's exporter).

    Raises:
        ValueError: If the exporter does not translate to this opset.
    """
    batch = torch.export.Dim('batch', min=1)
    inputs: tuple[Tensor, ...] = (images,)
    shapes: tuple[Any, ...] = ({0: batch},)
    if isinstance(module, ElasticSubnet):
        inputs = (images, *module.example_subnet)
        shapes = ({0: batch, 2: torch.export.Dim('height', min=1), 3: torch.export.Dim('width', min=1)}, None, None)
    if format == 'pt2':
        with torch.no_grad():
            exported = torch.export.export(module, inputs, dynamic_shapes=shapes)
        exported.example_inputs = None  # which a reader would unpickle
        # By way of memory: on a full disk torch's own writer ends the process.
        content = io.BytesIO()
        torch.export.save(exported, content, extra_files={f'{FACTS}.json': json.dumps(facts)} if facts else None)
        Path(path).write_bytes(content.getbuffer())
        return
    logging.getLogger('onnxscript.optimizer').setLevel(logging.ERROR)  # it warns of each constant that stays as it is
    with torch.no_grad():
        program: Any = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=['image', 'img_size', 'keep_rate'][:len(inputs)],
            output_names=['logits'],
            opset_version=opset,
            verbose=False,
        )
    if opset is not None:
        import onnx

        if program.model.opset_imports[''] != opset:
            raise ValueError(
                f'torch {torch.__version__} does not translate to opset {opset}; take {LEAST_OPSET} or leave it out')
        opset_id = onnx.helper.make_opsetid('', opset)
        program.model.ir_version = onnx.helper.find_min_ir_version_for([opset_id], ignore_unknown=True)
    graph = program.model.graph
    if isinstance(module, ElasticSubnet):
        _name_requirement(graph, 'img_size', module.require_size)
        _name_requirement(graph, 'keep_rate', module.require_rate)
    for node in graph.all_nodes():  # those of branches too
        node.metadata_props.clear()  # where each operator comes from: half of a small file, and paths of this machine
    if facts:
        facts['opset'] = program.model.opset_imports['']
        program.model.metadata_props[FACTS] = json.dumps(facts)
    program.save(path, external_data=False)


def _name_requirement(graph: Any, name: str, requirement: Requirement) -> None:
    """Name the node that fails where an input of an ONNX graph is not what it must be."""
    values = [next(value for value in graph.inputs if value.name == name)]
    for value in values:  # which grows: all that is computed from the input, in this order
        for node, _ in value.uses():
            if any(source is not None and (producer := source.producer()) is not None
                   and producer.op_type in ('NonZero', 'Transpose') for source in node.inputs) \
                    and node.op_type == 'Reshape':
                node.name = requirement.name
                return
            values += [output for output in node.outputs if output not in values]
