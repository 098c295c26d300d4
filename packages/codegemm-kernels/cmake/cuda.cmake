# Adds csrc/cuda/*.cu to a target when CUDA is wanted and there is a compiler, and prints what was decided.

# Sets `result` to the architectures to build for: the one given, the GPU of this machine, or all that this nvcc knows.
function(codegemm_cuda_architectures result)
  if(CODEGEMM_CUDA_ARCHITECTURES)
    set(${result} "${CODEGEMM_CUDA_ARCHITECTURES}" PARENT_SCOPE)
    return()
  endif()
  find_program(CODEGEMM_NVIDIA_SMI nvidia-smi)
  set(gpus "")
  if(CODEGEMM_NVIDIA_SMI)
    execute_process(COMMAND ${CODEGEMM_NVIDIA_SMI} -L OUTPUT_VARIABLE gpus ERROR_QUIET)
  endif()
  if(gpus MATCHES "GPU 0:")
    set(${result} native PARENT_SCOPE)
  elseif(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    set(${result} 80-real 86-real 89-real 90-real 100-real 120 PARENT_SCOPE)  # 120 carries the PTX for later ones
  else()
    set(${result} 80-real 86-real 89-real 90 PARENT_SCOPE)  # nvcc before 12.8 does not know 100 and 120
  endif()
endfunction()

macro(codegemm_add_cuda target)
  file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
  set(codegemm_nvcc "")
  if(NOT CODEGEMM_CUDA STREQUAL "OFF")
    # check_language alone sees nvcc only on PATH and would silently give a CPU build.
    find_program(
      CODEGEMM_NVCC nvcc
      HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda
      PATH_SUFFIXES bin)
    if(CMAKE_CUDA_COMPILER)
      set(codegemm_nvcc ${CMAKE_CUDA_COMPILER})
    elseif(CODEGEMM_NVCC)
      set(codegemm_nvcc ${CODEGEMM_NVCC})
    endif()
  endif()

  if(CODEGEMM_CUDA STREQUAL "ON" AND NOT codegemm_nvcc)
    message(FATAL_ERROR "CODEGEMM_CUDA=ON, but there is no nvcc: install the CUDA toolkit or set CUDA_HOME")
  elseif(CODEGEMM_CUDA STREQUAL "ON" AND NOT cuda_sources)
    message(FATAL_ERROR "CODEGEMM_CUDA=ON, but csrc/cuda holds no .cu file: the source tree is incomplete")
  elseif(codegemm_nvcc AND cuda_sources)
    set(CMAKE_CUDA_COMPILER ${codegemm_nvcc})
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES OFF)  # decided below, once the version of nvcc is known
    endif()
    enable_language(CUDA)
    codegemm_cuda_architectures(cuda_architectures)
    target_sources(${target} PRIVATE ${cuda_sources})
    set_target_properties(
      ${target} PROPERTIES CUDA_ARCHITECTURES "${cuda_architectures}" CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
      CUDA_RUNTIME_LIBRARY Static)
    # --threads compiles the architectures of one file side by side.
    target_compile_options(
      ${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--threads=2 -Xcompiler=-fvisibility=hidden>)
    target_compile_definitions(${target} PUBLIC CODEGEMM_WITH_CUDA)
    message(STATUS "codegemm: CUDA kernels ON (nvcc ${CMAKE_CUDA_COMPILER_VERSION}, architectures ${cuda_architectures})")
  elseif(CODEGEMM_CUDA STREQUAL "OFF")
    message(STATUS "codegemm: CUDA kernels OFF (CODEGEMM_CUDA=OFF)")
  elseif(NOT codegemm_nvcc)
    message(STATUS "codegemm: CUDA kernels OFF (no nvcc found; set CUDA_HOME, or CODEGEMM_CUDA=ON to insist)")
  else()
    message(STATUS "codegemm: CUDA kernels OFF (csrc/cuda holds no .cu file)")
  endif()
endmacro()
