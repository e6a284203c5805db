"""Text to 3D with its judge of finished shapes: the mode's command, to which the shape critic is handed in, as nothing that learns from
rewards or labels may import that.
"""

from eg3d_rlhf.distill.commands import distill as distill
from eg3d_rlhf.distill.compare import SHAPE_JUDGES
from eg3d_rlhf.evaluation.judges import critic_logits

SHAPE_JUDGES["critic"] = critic_logits
