# DECO_SANITIZE=address compiles the CPU module with AddressSanitizer and UndefinedBehaviorSanitizer, which end the process
# at the first error. One vector instruction set and little optimization keep the build short. See tests/sanitize.
set(DECO_SANITIZE "" CACHE STRING "address, or empty")
set(DECO_OPTIMIZE -O3)
set(DECO_VECTOR_ISAS avx2 avx512 avx512bf16)
if(DECO_SANITIZE STREQUAL "address")
  set(flags -fsanitize=address,undefined -fno-sanitize-recover=all)
  add_compile_options(${flags} -g1 -fno-omit-frame-pointer)
  add_link_options(${flags})
  set(DECO_OPTIMIZE -O1)
  set(DECO_VECTOR_ISAS avx2)
elseif(DECO_SANITIZE)
  message(FATAL_ERROR "DECO_SANITIZE: expected address or nothing, got '${DECO_SANITIZE}'")
endif()
