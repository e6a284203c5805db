"""Text to 3D with its judge of finished shapes: the mode's command, to which the shape critic is handed in, as nothing that learns from
rewards or labels may import that.
"""

from eg3d_rlhf.evaluation.judges import critic_logits
from eg3d_rlhf.modes import MODES
from eg3d_rlhf.modes.distill import distill as distill
from eg3d_rlhf.tuning.distill.compare import SHAPE_JUDGES

SHAPE_JUDGES["critic"] = critic_logits
MODES.add("distill", distill)  # type: ignore[arg-type]  # a click command still
