"""Values of the option --device, the same for every command."""

from typing import Any

import click


class DeviceChoice(click.Choice[str]):
    """Choice among devices that explains why a device of torch is not among them."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        """Return the device's name. See click for the arguments.

        Raises: click.BadParameter for any other name, with what to pass instead.
        """
        device_name = str(value).lower()
        if device_name.split(":")[0] == "mps":
            self.fail(
                "Apple GPUs (mps) are not supported, because nothing here was ever tested on one. Use"
                " --device=cpu.",
                param,
                context,
            )
        if device_name.startswith("cuda:"):
            device_index = device_name.removeprefix("cuda:")
            self.fail(
                f"a GPU is not chosen by its number here. Use --device=cuda with the environment variable"
                f" CUDA_VISIBLE_DEVICES={device_index}.",
                param,
                context,
            )
        if device_name == "gpu":
            self.fail("'gpu' is not a device. Use --device=cuda for an NVIDIA GPU.", param, context)
        return super().convert(value, param, context)


DEVICE = DeviceChoice(["auto", "cpu", "cuda"])
