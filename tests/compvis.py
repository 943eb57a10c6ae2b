"""CompVis' networks (latent diffusion, its autoencoders, SD 2.x's text encoder) as functions of weights by CompVis' names.

A second, independent writing for the tests. Each weight is drawn when it is first needed, so the functions state a checkpoint's layout too.
"""

import math

import torch
from torch.nn.functional import conv1d, conv2d, gelu, group_norm, interpolate, layer_norm, linear, multi_head_attention_forward, pad, silu

VOCABULARY, WIDTHS = 49408, (64, 128)


class Net(dict):
    """Weights by name, float32, drawn when first asked for; `under` sees those below a prefix."""

    def __init__(self, prefix="", weights=None):
        self.prefix, self.weights = prefix, {} if weights is None else weights
        self.generator = torch.Generator().manual_seed(len(prefix))

    def under(self, prefix):
        return Net(self.prefix + prefix, self.weights)

    def get(self, name, *shape, spread=0.1, centre=0.0):
        name = self.prefix + name
        if name not in self.weights:
            self.weights[name] = centre + spread * torch.randn(shape, generator=self.generator)
        return self.weights[name].double()

    def layer(self, function, name, x, *shape, bias=True, **options):
        weight = self.get(f"{name}.weight", *shape, spread=math.prod(shape[1:]) ** -0.5)
        return function(x, weight, self.get(f"{name}.bias", shape[0]) if bias else None, **options)

    def conv(self, name, x, out, kernel=3, **options):
        return self.layer(conv2d, name, x, out, x.shape[1], kernel, kernel, **{"padding": kernel // 2} | options)

    def linear(self, name, x, out, bias=True):
        return self.layer(linear, name, x, out, x.shape[-1], bias=bias)

    def norm(self, name, x, eps=1e-5):
        weight, bias = self.get(f"{name}.weight", x.shape[1], centre=1.0), self.get(f"{name}.bias", x.shape[1])
        return group_norm(x, 32, weight, bias, eps)

    def layer_norm(self, name, x):
        weight, bias = self.get(f"{name}.weight", x.shape[-1], centre=1.0), self.get(f"{name}.bias", x.shape[-1])
        return layer_norm(x, x.shape[-1:], weight, bias)


def attention(q, k, v, heads):
    q, k, v = (tokens.unflatten(-1, (heads, -1)).transpose(1, 2) for tokens in (q, k, v))
    return ((q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def residual(net, name, x, emb, out):
    h = net.conv(f"{name}.in_layers.2", silu(net.norm(f"{name}.in_layers.0", x)), out)
    h = h + net.linear(f"{name}.emb_layers.1", silu(emb), out)[:, :, None, None]
    h = net.conv(f"{name}.out_layers.3", silu(net.norm(f"{name}.out_layers.0", h)), out)
    return h + (x if x.shape[1] == out else net.conv(f"{name}.skip_connection", x, out, 1))


def cross_attention(net, name, x, context, heads):
    q, k, v = (
        net.linear(f"{name}.to_{letter}", of, x.shape[-1], bias=False) for letter, of in zip("qkv", (x, context, context), strict=True)
    )
    return net.linear(f"{name}.to_out.0", attention(q, k, v, heads), x.shape[-1])


def spatial_transformer(net, name, x, context, heads, linear_projection):
    width, block = x.shape[1], f"{name}.transformer_blocks.0"
    project = (lambda part, y: net.linear(part, y.mT, width).mT) if linear_projection else None
    project = project or (lambda part, y: net.conv(part, y.unflatten(2, x.shape[2:]), width, 1).flatten(2))
    h = project(f"{name}.proj_in", net.norm(f"{name}.norm", x, 1e-6).flatten(2)).mT
    h = h + cross_attention(net, f"{block}.attn1", normed := net.layer_norm(f"{block}.norm1", h), normed, heads)
    h = h + cross_attention(net, f"{block}.attn2", net.layer_norm(f"{block}.norm2", h), context, heads)
    value, gate = net.linear(f"{block}.ff.net.0.proj", net.layer_norm(f"{block}.norm3", h), 8 * width).chunk(2, -1)
    h = h + net.linear(f"{block}.ff.net.2", value * gelu(gate), width)
    return x + project(f"{name}.proj_out", h.mT).unflatten(2, x.shape[2:])


def plain_attention(net, name, x, heads, new_order):
    width = x.shape[1]
    qkv = net.layer(conv1d, f"{name}.qkv", net.norm(f"{name}.norm", x).flatten(2), 3 * width, width, 1)
    if new_order:
        q, k, v = qkv.chunk(3, 1)
    else:
        q, k, v = (part.flatten(1, 2) for part in qkv.unflatten(1, (heads, 3 * width // heads)).chunk(3, 2))
    h = net.layer(conv1d, f"{name}.proj_out", attention(q.mT, k.mT, v.mT, heads).mT, width, width, 1)
    return x + h.unflatten(2, x.shape[2:])


def unet(net, x, timesteps, context=None, labels=None, attends=(False, True), layers=1, heads=8, linear_projection=False, new_order=False):
    net, channels = net.under("model.diffusion_model."), x.shape[1]
    heads = heads if callable(heads) else lambda width, number=heads: number

    def attend(name, h):
        if context is None:
            return plain_attention(net, name, h, heads(h.shape[1]), new_order)
        return spatial_transformer(net, name, h, context, heads(h.shape[1]), linear_projection)

    frequencies = torch.exp(-math.log(10000) * torch.arange(WIDTHS[0] // 2) / (WIDTHS[0] // 2))
    angles = timesteps[:, None].float() * frequencies
    emb = net.linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], 1).double(), 4 * WIDTHS[0])
    emb = net.linear("time_embed.2", silu(emb), 4 * WIDTHS[0])
    if labels is not None:
        emb = emb + net.get("label_emb.weight", 5, emb.shape[1])[labels]
    skips = [h := net.conv("input_blocks.0.0", x, WIDTHS[0])]
    for level, width in enumerate(WIDTHS):
        for _ in range(layers):
            name = f"input_blocks.{len(skips)}"
            h = residual(net, f"{name}.0", h, emb, width)
            skips.append(h := attend(f"{name}.1", h) if attends[level] else h)
        if level < len(WIDTHS) - 1:
            skips.append(h := net.conv(f"input_blocks.{len(skips)}.0.op", h, width, stride=2))
    h = residual(net, "middle_block.0", h, emb, WIDTHS[-1])
    h = residual(net, "middle_block.2", attend("middle_block.1", h), emb, WIDTHS[-1])
    index = 0
    for level, width in reversed(list(enumerate(WIDTHS))):
        for place in range(layers + 1):
            name = f"output_blocks.{index}"
            h = residual(net, f"{name}.0", torch.cat([h, skips.pop()], 1), emb, width)
            h = attend(f"{name}.1", h) if attends[level] else h
            if level and place == layers:
                h = net.conv(f"{name}.{2 if attends[level] else 1}.conv", interpolate(h, scale_factor=2), width)
            index += 1
    return net.conv("out.2", silu(net.norm("out.0", h)), channels)


def vae_residual(net, name, x, out):
    h = net.conv(f"{name}.conv1", silu(net.norm(f"{name}.norm1", x, 1e-6)), out)
    h = net.conv(f"{name}.conv2", silu(net.norm(f"{name}.norm2", h, 1e-6)), out)
    return h + (x if x.shape[1] == out else net.conv(f"{name}.nin_shortcut", x, out, 1))


def vae_attention(net, name, x):
    h = net.norm(f"{name}.norm", x, 1e-6)
    q, k, v = (net.conv(f"{name}.{letter}", h, x.shape[1], 1).flatten(2).mT for letter in "qkv")
    return x + net.conv(f"{name}.proj_out", attention(q, k, v, 1).mT.unflatten(2, x.shape[2:]), x.shape[1], 1)


def vae_middle(net, side, h):
    h = vae_attention(net, f"{side}.mid.attn_1", vae_residual(net, f"{side}.mid.block_1", h, h.shape[1]))
    return vae_residual(net, f"{side}.mid.block_2", h, h.shape[1])


def vae_level(net, name, h, width, blocks, attends):
    for block in range(blocks):
        h = vae_residual(net, f"{name}.block.{block}", h, width)
        h = vae_attention(net, f"{name}.attn.{block}", h) if attends else h
    return h


def encode(net, x, moments, widths=(32, 64), attends=(False, False), embedding=None):
    h = net.conv("encoder.conv_in", x, widths[0])
    for level, width in enumerate(widths):
        h = vae_level(net, f"encoder.down.{level}", h, width, 2, attends[level])
        if level < len(widths) - 1:
            h = net.conv(f"encoder.down.{level}.downsample.conv", pad(h, (0, 1, 0, 1)), width, stride=2, padding=0)
    h = silu(net.norm("encoder.norm_out", vae_middle(net, "encoder", h), 1e-6))
    return net.conv("quant_conv", net.conv("encoder.conv_out", h, moments), embedding or moments, 1)


def decode(net, z, channels, widths=(32, 64), attends=(False, False), latent_channels=None):
    h = net.conv("decoder.conv_in", net.conv("post_quant_conv", z, latent_channels or z.shape[1], 1), widths[-1])
    h = vae_middle(net, "decoder", h)
    for level, width in reversed(list(enumerate(widths))):
        h = vae_level(net, f"decoder.up.{level}", h, width, 3, attends[level])
        if level:
            h = net.conv(f"decoder.up.{level}.upsample.conv", interpolate(h, scale_factor=2), width)
    return net.conv("decoder.conv_out", silu(net.norm("decoder.norm_out", h, 1e-6)), channels)


def quantise(net, z):
    table = net.get("quantize.embedding.weight", 16, z.shape[1], spread=1.0)
    return table[torch.cdist(z.movedim(1, -1).flatten(1, 2), table[None]).argmin(-1)].unflatten(1, z.shape[2:]).movedim(-1, 1)


def open_clip(net, ids, width=64, layers=3):
    """CompVis' "penultimate": the last of the layers is not run, but lies in the file."""
    net = net.under("cond_stage_model.model.")
    h = net.get("token_embedding.weight", VOCABULARY, width)[ids] + net.get("positional_embedding", 77, width)[: ids.shape[1]]
    mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1).double()
    for layer in range(layers):
        name, x = f"transformer.resblocks.{layer}", h
        qkv = net.get(f"{name}.attn.in_proj_weight", 3 * width, width), net.get(f"{name}.attn.in_proj_bias", 3 * width)
        out = net.get(f"{name}.attn.out_proj.weight", width, width), net.get(f"{name}.attn.out_proj.bias", width)
        y = net.layer_norm(f"{name}.ln_1", x).transpose(0, 1)
        y = multi_head_attention_forward(y, y, y, width, width // 64, *qkv, None, None, False, 0.0, *out, attn_mask=mask)[0]
        x = x + y.transpose(0, 1)
        y = gelu(net.linear(f"{name}.mlp.c_fc", net.layer_norm(f"{name}.ln_2", x), 4 * width))
        x = x + net.linear(f"{name}.mlp.c_proj", y, width)
        h = x if layer < layers - 1 else h
    net.get("text_projection", width, width), net.get("logit_scale")
    return net.layer_norm("ln_final", h)
