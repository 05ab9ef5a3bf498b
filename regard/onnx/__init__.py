"""Layers and products as ONNX graphs, with the operator `Attention` of opset 23.

    regard.onnx.export(layer, (x,), "layer.onnx", kwargs={"mask": Causal()})

or, what it calls, `torch.onnx.export(module, inputs, dynamo=True, opset_version=23)`: inside of
either a product is written in operators of torch that the exporter knows. Softmax of a dot product
(Dot, Bilinear, Cosine; fewer key heads, too) becomes `Attention`, with

    scale              an attribute; a tensor or a number that is not positive multiplies the query
    softcap            an attribute, where there is neither mask nor bias
    Causal()           is_causal, for as many queries as keys, without softcap, bias or more masks
    masks, positions   attn_mask, n x m for each head that has its own, computed in the graph from
                       its lengths: bool for masks alone, numbers where a position adds some

A softcap under a mask is spelled out, although `Attention` has it: in its first edition the mask
went through the softcap, which lets forbidden keys through (onnx/onnx#7867), and runtimes of that
time do so silently. Every other score and normalizer, sinks too, is the textbook in the graph, with
n x m numbers for each head. So n x m numbers exist in an exported graph only, for what its operator
lacks. Rows that see no key are 0, in every runtime.

Refused, with the reason: dropout, score functions and masks of your own, decay and the delta rule,
looks (a graph holds products).
"""

from regard.onnx.export import export
from regard.onnx.product import decompositions, needs, product

__all__ = ["decompositions", "export", "needs", "product"]
