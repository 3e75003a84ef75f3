"""The functions under the module name that programs also import them from."""

from foveal.compat.flash_attn._batch import flash_attn_func as flash_attn_func
from foveal.compat.flash_attn._batch import flash_attn_kvpacked_func as flash_attn_kvpacked_func
from foveal.compat.flash_attn._batch import flash_attn_qkvpacked_func as flash_attn_qkvpacked_func
from foveal.compat.flash_attn._kvcache import flash_attn_with_kvcache as flash_attn_with_kvcache
from foveal.compat.flash_attn._varlen import flash_attn_varlen_func as flash_attn_varlen_func
from foveal.compat.flash_attn._varlen import flash_attn_varlen_kvpacked_func as flash_attn_varlen_kvpacked_func
from foveal.compat.flash_attn._varlen import flash_attn_varlen_qkvpacked_func as flash_attn_varlen_qkvpacked_func
