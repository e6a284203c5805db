"""What the JSON files of both of TRELLIS's flows say."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """What a flow's JSON file calls args, as far as both flows have it."""

    resolution: int
    in_channels: int
    model_channels: int
    cond_channels: int
    out_channels: int
    num_blocks: int
    num_heads: int | None = None  # or model_channels / num_head_channels
    num_head_channels: int = 64
    mlp_ratio: float = 4
    patch_size: int = 2  # edge of a token, in the latents' cells
    pe_mode: str = "ape"
    use_fp16: bool = False  # type of the blocks as built; files bring their own
    use_checkpoint: bool = False  # compute blocks again in the backward pass
    share_mod: bool = False
    qk_rms_norm: bool = False
    qk_rms_norm_cross: bool = False

    def __post_init__(self):
        who = type(self).__name__
        if self.pe_mode != "ape":
            raise ValueError(f"{who}: expected pe_mode 'ape', got {self.pe_mode!r}. Rotary positions are in no released model.")
        if self.resolution % self.patch_size or self.model_channels % self.heads:
            raise ValueError(
                f"{who}: expected patch_size to divide resolution and heads model_channels, got {self.resolution} / {self.patch_size} "
                f"and {self.model_channels} / {self.heads}. Correct the model's JSON file."
            )

    @property
    def heads(self) -> int:
        return self.num_heads or self.model_channels // self.num_head_channels
