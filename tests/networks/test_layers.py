import pytest
import torch
import torch.nn.functional as F

from aligntok.networks.layers import Attention, RMSNorm, SwiGLU
from aligntok.networks.positions import grid_coordinates, rotary_table, rotate


@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 4), (torch.bfloat16, 1)])
def test_rms_norm(dtype, roundings):
    norm, x = RMSNorm(64, eps=1e-6), (torch.randn(5, 64) * 3).to(dtype)
    torch.nn.init.normal_(norm.weight)
    y = norm(x)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    assert y.dtype == dtype
    # bfloat16 is rounded once, at the end; float32 in each of the steps
    assert (y - exact).abs().max() <= exact.abs().max() * roundings * torch.finfo(dtype).eps


def test_gated_mlp():
    mlp, x = SwiGLU(6, 10), torch.randn(3, 6)
    gate, value = (x @ mlp.proj_in.weight.T + mlp.proj_in.bias).split(10, dim=1)
    torch.testing.assert_close(mlp(x), F.linear(gate * gate.sigmoid() * value, mlp.proj_out.weight, mlp.proj_out.bias))
    assert [name for name, _ in SwiGLU(6, 10, bias=False).named_parameters()] == ["proj_in.weight", "proj_out.weight"]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_head_by_head(qk_norm):
    """Rows of qkv are q, k, v, each head by head; norms come before the rotation; scale is head_dim^-1/2."""
    attention, x, table = Attention(16, 2, qk_norm), torch.randn(1, 6, 16), rotary_table(grid_coordinates(2, 3), 8)
    heads = []
    for head in range(2):
        rows = slice(head * 8, head * 8 + 8)
        q, k, v = (
            F.linear(x, weight[rows], bias[rows])
            for weight, bias in zip(attention.qkv.weight.split(16), attention.qkv.bias.split(16), strict=True)
        )
        if qk_norm:
            q, k = F.rms_norm(q, (8,), eps=1e-6), F.rms_norm(k, (8,), eps=1e-6)
        q, k = (rotate(z[:, None], table)[:, 0] for z in (q, k))
        heads.append((q @ k.transpose(1, 2) * 8**-0.5).softmax(-1) @ v)
    torch.testing.assert_close(attention(x, table), attention.proj(torch.cat(heads, dim=-1)))
