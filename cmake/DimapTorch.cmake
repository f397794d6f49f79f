# Where torch is. find_package(Torch) fails on partial CUDA toolkits and pulls in what the Stable ABI does not need, so
# the folders come from the Python that builds the package.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import os, sys
import importlib.util as u
spec = u.find_spec('torch')
sys.exit('torch is not installed in ' + sys.executable) if spec is None else None
root = os.path.dirname(spec.origin)
scope = {}
exec(open(os.path.join(root, 'version.py')).read(), scope)
print(os.path.join(root, 'include'), os.path.join(root, 'lib'), scope['__version__'], sep=';')"
  OUTPUT_VARIABLE DIMAP_TORCH
  ERROR_VARIABLE DIMAP_TORCH_ERROR
  OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE DIMAP_TORCH_FAILED)
if(DIMAP_TORCH_FAILED)
  message(FATAL_ERROR "dimap: ${DIMAP_TORCH_ERROR}")
endif()
list(GET DIMAP_TORCH 0 DIMAP_TORCH_INCLUDE)
list(GET DIMAP_TORCH 1 DIMAP_TORCH_LIB)
list(GET DIMAP_TORCH 2 DIMAP_TORCH_VERSION)

# One build runs on this torch and on every later one.
set(DIMAP_TORCH_TARGET 2.10)
set(DIMAP_TORCH_DEFINITIONS TORCH_TARGET_VERSION=0x020a000000000000)
set(DIMAP_TORCH_LIBRARIES ${DIMAP_TORCH_LIB}/libtorch.so ${DIMAP_TORCH_LIB}/libtorch_cpu.so)
message(STATUS "dimap: torch ${DIMAP_TORCH_VERSION} in ${DIMAP_TORCH_INCLUDE}, targeting the ABI of ${DIMAP_TORCH_TARGET}")
