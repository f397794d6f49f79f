# Where torch is. find_package(Torch) fails on partial CUDA toolkits and pulls in what the Stable ABI does not need, so
# the folders come from the Python that builds the package: DIMAP_TORCH in the environment names torch's folder;
# else it is the torch that can be imported, or the one that lies in the environment around an isolated build.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import os, sys, sysconfig
import importlib.util as u
spec = u.find_spec('torch')
around = os.path.join(sysconfig.get_path('purelib'), 'torch')
root = os.environ.get('DIMAP_TORCH') or (os.path.dirname(spec.origin) if spec else around)
os.path.exists(os.path.join(root, 'version.py')) or sys.exit('torch must be installed in ' + root)
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
