"""SAM's vision encoder, which hands out one of its layers, and those layers in parts that stay small."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.sam.modeling_sam import SamVisionEncoder, SamVisionEncoderOutput, SamVisionLayer

# Matrix units for tiles of bfloat16 (AMX) are what torch's own attention is fast with.
_HAS_TILES = getattr(torch.cpu, "_is_amx_tile_supported", bool)()

# How much is worked on at a time: tokens outside attention, values of the bias that attention gets, queries of all
# heads where that bias is in their product, and logits where attention is written out. A processor likes what fits
# its caches, and with tiles what gives its threads equal shares; a graphics card what fills it.
_CPU_TOKENS = 2**11 if _HAS_TILES else 2**10
_CPU_BIAS, _CPU_QUERIES, _CPU_LOGITS = 2**22, 2**13, 2**20
_GPU_TOKENS, _GPU_BIAS = 2**16, 2**28


def _onednn_dtypes() -> frozenset[torch.dtype]:
    """In which oneDNN's products are fast on this processor: none where torch has no oneDNN, or no x86."""
    # The operator that torch.compile puts in place of linear layers; its name is not promised.
    if not (torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return frozenset()
    in_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return frozenset({torch.float32, torch.bfloat16} if in_bfloat16 else {torch.float32})


_ONEDNN_DTYPES = _onednn_dtypes()


class UnSegVisionEncoder(SamVisionEncoder):
    """SAM's vision encoder, which can hand out what one of its layers makes.

    The stock encoder does so as well, by hooks that stay on its layers: no model that has them can be pickled, and so
    be sent to another process or hashed for a cache.

    Args:
        encoder: the stock encoder; its modules are taken over.
    """

    def __init__(self, encoder: SamVisionEncoder):
        super(SamVisionEncoder, self).__init__(encoder.config)  # the stock one's would make weights that nobody needs
        self.image_size, self.gradient_checkpointing = encoder.image_size, encoder.gradient_checkpointing
        self.patch_embed, self.pos_embed = encoder.patch_embed, encoder.pos_embed
        self.layers, self.neck = encoder.layers, encoder.neck
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor | None = None, layer: int | None = None, **kwargs
    ) -> SamVisionEncoderOutput | tuple:
        """As the stock encoder's; with `layer`, from 1 on, its output is all that there is of `hidden_states`."""
        if layer is None:
            return super().forward(pixel_values, **kwargs)
        # So that what comes out lies in memory as the layers read it.
        hidden = self.patch_embed(pixel_values.contiguous(memory_format=torch.channels_last))
        if self.pos_embed is not None:
            hidden = hidden + self.pos_embed
        for number, one in enumerate(self.layers, 1):
            hidden = one(hidden)
            if number == layer:
                kept = hidden
        return SamVisionEncoderOutput(last_hidden_state=self.neck(hidden), hidden_states=(kept,))


class UnSegVisionLayer(SamVisionLayer):
    """A vision layer of SAM, with its own weights under their own names, that never holds a whole layer's products.

    SAM adds a bias to the attention between every two tokens: with 64 x 64 tokens and 12 heads it takes 805 MB in
    float32, and the windowed layers' about half of their memory. Here it is made for a few rows of a few heads, used,
    and forgotten. All sums are the stock layer's; only the rounding of matrix products can differ.

    Attention and MLP may be in another dtype than the rest: their products then have that dtype, and what goes from
    layer to layer keeps its own.

    Args:
        layer: the stock layer, with scaled dot product attention; its modules are taken over.
    """

    def __init__(self, layer: SamVisionLayer):
        nn.Module.__init__(self)  # the stock layer's would make weights that nobody needs
        self.layer_norm1, self.attn = layer.layer_norm1, layer.attn
        self.layer_norm2, self.mlp = layer.layer_norm2, layer.mlp
        self.window_size = layer.window_size
        for module, name in ((self.attn, "qkv"), (self.attn, "proj"), (self.mlp, "lin1"), (self.mlp, "lin2")):
            setattr(module, name, _Linear(getattr(module, name)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, height, width, channels)` to the same."""
        batch, _, width, _ = hidden_states.shape
        tokens = _CPU_TOKENS if hidden_states.device.type == "cpu" else _GPU_TOKENS
        rows = max(tokens // (batch * width), 1)
        if self.window_size:
            rows = max(rows // self.window_size, 1) * self.window_size
            attended = map(self._attend_in_windows, hidden_states.split(rows, 1))
        else:
            attended = self._attend(self.attn.qkv(self._normed(hidden_states))).split(rows, 1)
        strips = zip(hidden_states.split(rows, 1), attended, strict=True)
        return torch.cat([self._after_attention(*strip) for strip in strips], 1)

    def _normed(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.layer_norm1(hidden_states).to(self.attn.qkv.weight.dtype)

    def _after_attention(self, hidden_states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.attn.proj(attended)
        return hidden_states + self.mlp(self.layer_norm2(hidden_states).to(self.mlp.lin1.weight.dtype))

    def _attend_in_windows(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Rows of whole windows, `(batch, height, width, channels)` to the same."""
        windows, padded = self.window_partition(self._normed(hidden_states), self.window_size)
        attended = self._attend(self.attn.qkv(windows))
        return self.window_unpartition(attended, self.window_size, padded, hidden_states.shape[1:3])

    def _attend(self, projected: torch.Tensor) -> torch.Tensor:
        """`(images or windows, height, width, 3 * channels)` to `(images or windows, height, width, channels)`."""
        attn, (batch, height, width, _) = self.attn, projected.shape
        heads, tokens = attn.num_attention_heads, height * width
        # Views, not copies: (images or windows, heads, tokens, channels of a head).
        query, key, value = projected.view(batch, tokens, 3, heads, -1).transpose(1, 3).unbind(2)
        if attn.use_rel_pos:
            down, across = _by_distance(attn.rel_pos_h, height), _by_distance(attn.rel_pos_w, width)
            on_cpu = query.device.type == "cpu"
            # Not float32, whose written-out products are no faster than torch's attention.
            fast = query.dtype == torch.bfloat16 and query.dtype in _ONEDNN_DTYPES
            fast = on_cpu and fast and not torch.is_grad_enabled()
            if fast and _HAS_TILES:
                # Of few heads, or the allocator hands its memory back between layers, and is given it page by page.
                count = max(_CPU_QUERIES // (batch * tokens), 1)
                attended = _in_channels(query, key, value, down, across, count)
            else:
                limit = _CPU_LOGITS if fast else _CPU_BIAS if on_cpu else _GPU_BIAS
                count, rows = max(limit // tokens**2, 1), max(limit // (width * tokens), 1)
                attention = _written_out if fast else _in_parts
                attended = attention(query, key, value, down, across, count, rows)
        else:
            attended = F.scaled_dot_product_attention(query, key, value)
        return attended.transpose(1, 2).reshape(batch, height, width, -1)


class _Linear(nn.Linear):
    """A linear layer that takes over another one's weights, and without gradients oneDNN's products on x86.

    Torch's own in float32 are MKL's, which are half as fast on AMD's processors (on Intel's they are alike), and those
    in bfloat16 have the bias copied first. The same sums, which may be rounded otherwise.
    """

    def __init__(self, linear: nn.Linear):
        self.__dict__.update(linear.__dict__)  # also that it has been initialized, or it would be once more

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ours = x.device.type == "cpu" and x.dtype in _ONEDNN_DTYPES and type(self.weight) is nn.Parameter
        if not ours or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def _by_distance(table: torch.Tensor, side: int) -> torch.Tensor:
    """`(2 * side - 1, channels)`, a row for each distance, to `(side, side, channels)`, one for each query and key.

    The same as the stock layer's `get_rel_pos`, whose index is made on the CPU: a graphics card waits for that.
    """
    places = torch.arange(side, device=table.device)
    return table[places[:, None] - places + side - 1]


def _in_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    down: torch.Tensor,
    across: torch.Tensor,
    count: int,
    rows: int,
) -> torch.Tensor:
    """Torch's attention of all heads, of so many heads and rows of queries at a time."""

    def attend(some) -> torch.Tensor:  # torch 2.6 compiles no tuple[...] here
        parts = zip(*(tensor.split(count, 1) for tensor in some), strict=True)
        return torch.cat([_with_bias(*part, down, across, rows) for part in parts], 1)

    images = (tensor.split(max(count // query.shape[1], 1)) for tensor in (query, key, value))
    return torch.cat([attend(some) for some in zip(*images, strict=True)])


def _with_bias(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, down: torch.Tensor, across: torch.Tensor, rows: int
) -> torch.Tensor:
    """Attention of some heads `(images, heads, tokens, channels)`, with the bias of so many rows of queries at a time.

    `down` and `across`, `(height, height, channels)` and `(width, width, channels)`, are what a query is multiplied
    with for its bias towards a key so many rows and columns away.
    """
    attended, room = [], None
    grid = query.unflatten(2, (len(down), len(across)))
    for some, own in zip(grid.split(rows, 2), down.split(rows), strict=True):
        vertical = torch.einsum("nhrwc,rkc->nhrwk", some, own)
        horizontal = torch.einsum("nhrwc,wkc->nhrwk", some, across)
        shape = (*vertical.shape, len(across))
        if not torch.is_grad_enabled() and (room is None or room.shape != shape):
            room = query.new_empty(shape)  # fresh memory for every strip takes longer than what is written into it
        bias = torch.add(vertical.unsqueeze(-1), horizontal.unsqueeze(-2), out=room).flatten(4).flatten(2, 3)
        attended.append(F.scaled_dot_product_attention(some.flatten(2, 3), key, value, attn_mask=bias))
    return torch.cat(attended, 2)


def _in_channels(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, down: torch.Tensor, across: torch.Tensor, count: int
) -> torch.Tensor:
    """What `_in_parts` gives, of so many heads at a time, by torch's attention with the bias in its product.

    For bfloat16 where a processor has units for tiles of it, without gradients: there a bias takes longer to be made
    and read than to be multiplied. Queries have it as channels, beside ones and zeros of the keys, for their row and
    for their column; it is rounded no further.
    """
    channels, height, width = query.shape[-1], len(down), len(across)
    spare = -(channels + height + width) % 32  # of a tile's channels
    across = F.pad(across, (0, 0, 0, spare))
    row = torch.eye(height, dtype=key.dtype).repeat_interleave(width, 0)
    column = torch.eye(width, width + spare, dtype=key.dtype).repeat(height, 1)
    attended = []
    for some, keys, values in zip(*(tensor.split(count, 1) for tensor in (query, key, value)), strict=True):
        places, grid = (*some.shape[:2], -1, -1), some.unflatten(2, (height, width))
        vertical = torch.einsum("nhrwc,rkc->nhrwk", grid, down).flatten(2, 3)
        horizontal = torch.einsum("nhrwc,wkc->nhrwk", grid, across).flatten(2, 3)
        queries = torch.cat([some * channels**-0.5, vertical, horizontal], -1)
        keys = torch.cat([keys, row.expand(places), column.expand(places)], -1)
        values = F.pad(values, (0, keys.shape[-1] - channels))  # torch's attention is slow where it has fewer channels
        attended.append(F.scaled_dot_product_attention(queries, keys, values, scale=1.0)[..., :channels])
    return torch.cat(attended, 1)


def _written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    down: torch.Tensor,
    across: torch.Tensor,
    count: int,
    rows: int,
) -> torch.Tensor:
    """What `_in_parts` gives, as products and a softmax.

    For bfloat16 on a processor, without gradients: torch's own attention does not use all of its units, and reads a
    bias more slowly than these products add it up. They start with the bias of the keys' rows; that of their columns
    is in the product, as channels of the query beside ones and zeros of the key.
    """
    images, heads, tokens, channels = query.shape
    height, width = len(down), len(across)
    grid = query.unflatten(2, (height, width))
    # Softmax does not change with what all keys have in common. Without it the largest logits are the smallest
    # numbers, which bfloat16 rounds least.
    vertical, horizontal = (
        (bias - bias.amax(-1, keepdim=True)).flatten(2, 3)
        for bias in (torch.einsum("nhrwc,rkc->nhrwk", grid, down), torch.einsum("nhrwc,wkc->nhrwk", grid, across))
    )
    columns = torch.eye(width, dtype=key.dtype).repeat(height, 1).expand(images, heads, -1, -1)
    queries = torch.cat([query * channels**-0.5, horizontal], -1)
    keys = torch.cat([key, columns], -1).transpose(2, 3)
    attended = torch.empty_like(query, memory_format=torch.contiguous_format)
    room = None
    parts = (tensor.flatten(0, 1).split(count) for tensor in (keys, value, queries, vertical, attended))
    for keys, values, *of_queries in zip(*parts, strict=True):
        values = values.contiguous()  # not anew for every strip
        for some, bias, result in zip(*(tensor.split(rows * width, 1) for tensor in of_queries), strict=True):
            shape = (*some.shape[:2], tokens)
            if room is None or room.shape != shape:
                room = query.new_empty(shape)
            room.unflatten(2, (height, width)).copy_(bias.unsqueeze(-1).expand(-1, -1, -1, width))
            torch.softmax(room.baddbmm_(some, keys), -1, out=room)
            torch.bmm(room, values, out=result)
    return attended


__all__ = ["UnSegVisionLayer"]
