"""A judge: a vision-language model that compares 3D assets where an annotator would.

A judge is asked through a server with the interface "chat completions". Every question is asked in both
orders of the two assets, and a verdict needs the same answer in both. Answers are stored, so that a run can
be repeated without the server. `Calibration` measures a judge against people, by criterion.

    settings.py      questions, limits and addresses (`JudgeSettings`), and what an identity depends on
    verdicts.py      parsing of answers, and the verdict from the answers in both orders
    answers.py       file of answers, which is a cache and a replay
    client.py        asynchronous client with retries and limits
    judge.py         `Judge.compare`, which asks about pairs
    renders.py       the fixed rig of cameras, and montages that are cached by the hash of an asset
    view_maps.py     colours, normals and masks of meshes, splats and fields
    gold_pairs.py    damaged copies of assets, with a known answer
    calibration.py   `Calibration`, and its gate

Judges are no people: the code that stores or learns from labels keeps both apart.
"""
