# Adds csrc/cuda/*.cu to a target when CUDA is wanted and there is a compiler, and prints what was decided.

# Sets `result` to the architectures to build for: the ones given, the GPU of this machine, or those of a release, which
# is also what CODEGEMM_CUDA_ARCHITECTURES=release means.
function(codegemm_cuda_architectures result)
  if(CODEGEMM_CUDA_ARCHITECTURES AND NOT CODEGEMM_CUDA_ARCHITECTURES STREQUAL "release")
    # Kernels for less than 9.0 know no clusters, and launchers look at the GPU: on a later one their PTX would compile
    # and compute nothing. So there is none of it, and such a GPU says that it has no kernel image.
    set(given ${CODEGEMM_CUDA_ARCHITECTURES})
    list(TRANSFORM given REPLACE "^([1-8][0-9])$" "\\1-real")
    if(given MATCHES "(^|;)[1-8][0-9]-virtual")
      message(FATAL_ERROR
        "CODEGEMM_CUDA_ARCHITECTURES=${CODEGEMM_CUDA_ARCHITECTURES}: PTX for less than 90 does not work on later GPUs; "
        "leave out -virtual, or add 90")
    endif()
    set(${result} ${given} PARENT_SCOPE)
    return()
  endif()
  set(gpus "")
  if(NOT CODEGEMM_CUDA_ARCHITECTURES)
    find_program(CODEGEMM_NVIDIA_SMI nvidia-smi)
    if(CODEGEMM_NVIDIA_SMI)
      execute_process(COMMAND ${CODEGEMM_NVIDIA_SMI} -L OUTPUT_VARIABLE gpus ERROR_QUIET)
    endif()
  endif()
  if(gpus MATCHES "GPU 0:")
    set(${result} native PARENT_SCOPE)
  elseif(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    set(${result} 80-real 86-real 89-real 90-real 100-real 120 PARENT_SCOPE)  # 120 carries the PTX for later ones
  else()
    set(${result} 80-real 86-real 89-real 90 PARENT_SCOPE)  # nvcc before 12.8 does not know 100 and 120
  endif()
endfunction()

# Sets `result` to the folder of the CUDA toolkit that pip installs (pyproject.toml asks for it when CODEGEMM_CUDA=PIP).
# nvidia.cu13 is a namespace: an isolated build may see a second folder of it, without a compiler.
function(codegemm_find_pip_toolkit result)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import nvidia.cu13 as toolkit; print(*toolkit.__path__, sep=';')"
    OUTPUT_VARIABLE folders OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  set(${result} "" PARENT_SCOPE)
  foreach(folder IN LISTS folders)
    if(EXISTS "${folder}/bin/nvcc")
      set(${result} "${folder}" PARENT_SCOPE)
    endif()
  endforeach()
endfunction()

# Sets `result` to the CUDA compiler to use, or to nothing. Fails where CODEGEMM_CUDA insists on one and there is none.
function(codegemm_find_nvcc result)
  set(nvcc "")
  if(CODEGEMM_CUDA STREQUAL "PIP")
    codegemm_find_pip_toolkit(toolkit)
    if(NOT toolkit)
      message(FATAL_ERROR
        "CODEGEMM_CUDA=PIP, but ${Python_EXECUTABLE} has no nvcc from PyPI: build with isolation, which installs it, "
        "or install what [[tool.scikit-build.overrides]] in pyproject.toml lists")
    endif()
    set(nvcc "${toolkit}/bin/nvcc")
  elseif(CODEGEMM_CUDA MATCHES "^(AUTO|ON)$")
    if(CMAKE_CUDA_COMPILER)
      set(nvcc "${CMAKE_CUDA_COMPILER}")
    elseif(DEFINED ENV{CUDACXX})
      set(nvcc "$ENV{CUDACXX}")
    else()
      # check_language alone sees nvcc only on PATH and would silently give a CPU build.
      find_program(
        CODEGEMM_NVCC nvcc
        HINTS ENV CUDA_HOME ENV CUDA_PATH
        PATHS /usr/local/cuda /opt/cuda
        PATH_SUFFIXES bin)
      if(CODEGEMM_NVCC)
        set(nvcc "${CODEGEMM_NVCC}")
      elseif(CODEGEMM_CUDA STREQUAL "ON")
        message(FATAL_ERROR
          "CODEGEMM_CUDA=ON, but there is no nvcc: install the CUDA toolkit, set CUDA_HOME to its folder, "
          "or set CODEGEMM_CUDA=PIP to take the compiler from PyPI")
      endif()
    endif()
  elseif(NOT CODEGEMM_CUDA STREQUAL "OFF")
    message(FATAL_ERROR "CODEGEMM_CUDA must be AUTO, ON, OFF or PIP, not '${CODEGEMM_CUDA}'")
  endif()
  set(${result} "${nvcc}" PARENT_SCOPE)
endfunction()

macro(codegemm_add_cuda target)
  file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
  codegemm_find_nvcc(codegemm_nvcc)
  if(codegemm_nvcc AND NOT cuda_sources)
    message(FATAL_ERROR "csrc/cuda holds no .cu file: the source tree is incomplete")
  elseif(codegemm_nvcc)
    set(CMAKE_CUDA_COMPILER ${codegemm_nvcc})
    if(CODEGEMM_CUDA STREQUAL "PIP")
      # Its nvcc.profile looks for libcudart_static.a in lib64, and the packages have lib: say so to the test programs
      # of enable_language, and to the linker below.
      get_filename_component(codegemm_cuda_lib "${codegemm_nvcc}/../../lib" ABSOLUTE)
      set(ENV{NVCC_APPEND_FLAGS} "$ENV{NVCC_APPEND_FLAGS} -L${codegemm_cuda_lib}")
      target_link_directories(${target} PUBLIC "${codegemm_cuda_lib}")
    endif()
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES OFF)  # decided below, once the version of nvcc is known
    endif()
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.1)
      message(FATAL_ERROR
        "nvcc ${CMAKE_CUDA_COMPILER_VERSION} does not know all instructions of Hopper: install CUDA 12.1 or later, or set "
        "CODEGEMM_CUDA=PIP to take the compiler from PyPI, or OFF to build without CUDA kernels")
    endif()
    codegemm_cuda_architectures(cuda_architectures)
    # Instructions that only capability 9.0 has; the launcher calls them nowhere else.
    set(hopper_sources ${cuda_sources})
    list(FILTER hopper_sources INCLUDE REGEX "_wgmma\\.cu$")
    list(FILTER cuda_sources EXCLUDE REGEX "_wgmma\\.cu$")
    add_library(codegemm_hopper OBJECT ${hopper_sources})
    target_include_directories(codegemm_hopper PRIVATE csrc)
    target_sources(${target} PRIVATE ${cuda_sources} $<TARGET_OBJECTS:codegemm_hopper>)
    set_target_properties(codegemm_hopper PROPERTIES CUDA_ARCHITECTURES 90a-real)
    set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES "${cuda_architectures}")
    foreach(compiled IN ITEMS ${target} codegemm_hopper)
      set_target_properties(
        ${compiled} PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Static)
      # --threads compiles the architectures of one file side by side.
      target_compile_options(
        ${compiled} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--threads=2 -Xcompiler=-fvisibility=hidden>)
    endforeach()
    target_compile_definitions(${target} PUBLIC CODEGEMM_WITH_CUDA)
    message(STATUS
      "codegemm: CUDA kernels ON (nvcc ${CMAKE_CUDA_COMPILER_VERSION}, architectures ${cuda_architectures}, "
      "${codegemm_nvcc})")
  elseif(CODEGEMM_CUDA STREQUAL "OFF")
    message(STATUS "codegemm: CUDA kernels OFF (CODEGEMM_CUDA=OFF)")
  else()
    message(STATUS "codegemm: CUDA kernels OFF (no nvcc found; set CUDA_HOME, or CODEGEMM_CUDA=ON or PIP to insist)")
  endif()
endmacro()
