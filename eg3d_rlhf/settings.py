"""Settings of the GAN mode: which of them decide what a run trains."""

# What the run with lambda_r = 0 does not depend on: the reward's own settings, names of files (their hashes count), and how a run is shown.
_NOT_THE_CONTROLS = {
    "lambda_r", "lambda_sigma", "lambda_front", "reward_clip", "reward_shaping", "reward_ckpt", "reward_watch", "rlr", "anchor_resolution",
    "control", "desc", "device", "launch", "no_summary", "processes", "versions", "init", "tick", "snap", "checkpoint_ticks", "batch_gpu",
    "hashes",
}


def control_differs(settings: dict, record: dict) -> list[str]:
    """What keeps a run with lambda_r = 0 from being the control of another: 'name got instead of expected', [] where nothing does.

    Args:
        settings: of the tuned run, as its folder records them, with the `hashes` of its inputs.
        record: of the control, likewise; settings that only one of the two knows are not compared.
    """
    names = sorted((settings.keys() & record.keys()) - _NOT_THE_CONTROLS)
    pairs = {name: (record[name], settings[name]) for name in names}
    pairs["lambda_r"] = record.get("lambda_r", 0), 0
    of_control, own = record.get("hashes", {}), settings.get("hashes", {})
    pairs |= {f"{name} (bytes)": (of_control[name][:8], own[name][:8]) for name in ("init", "reward") if name in own and name in of_control}
    return [f"{name} {theirs} instead of {ours}" for name, (theirs, ours) in pairs.items() if theirs != ours]
