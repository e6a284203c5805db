"""Names that code of EG3D users imports: EasyDict, construct_class_by_name, call_func_by_name, open_url.

This package uses the standard library only.
"""

from dnnlib.util import EasyDict, call_func_by_name, construct_class_by_name, get_obj_by_name, open_url

__all__ = ["EasyDict", "call_func_by_name", "construct_class_by_name", "get_obj_by_name", "open_url"]
