# DECO_SANITIZE compiles with sanitizers, which end the process at the first error; tests/sanitize runs such builds.
#   address  AddressSanitizer and UndefinedBehaviorSanitizer
#   thread   ThreadSanitizer; parts run on std::thread, because OpenMP runtimes are not instrumented
# Little optimization, checks of memory as calls, and no checks that AddressSanitizer covers keep the build short.
set(DECO_SANITIZE "" CACHE STRING "address, thread, or empty")
if(DECO_SANITIZE STREQUAL "address")
  set(DECO_SANITIZE_FLAGS -fsanitize=address,undefined -fno-sanitize=null,object-size,pointer-overflow,vptr
                          -fno-sanitize-recover=all --param=asan-instrumentation-with-call-threshold=0)
  # The undefined behavior of the common sources is checked in the sets that compile fast.
  foreach(isa avx512 avx512bf16 amx)
    set(DECO_SANITIZE_FLAGS_${isa} -fno-sanitize=undefined)
  endforeach()
elseif(DECO_SANITIZE STREQUAL "thread")
  set(DECO_SANITIZE_FLAGS -fsanitize=thread)
  add_compile_definitions(DECO_STD_THREADS)
  set(DECO_VECTOR_ISAS avx2)
elseif(DECO_SANITIZE)
  message(FATAL_ERROR "DECO_SANITIZE: expected address, thread or nothing, got '${DECO_SANITIZE}'")
endif()
if(DECO_SANITIZE)
  add_compile_options(${DECO_SANITIZE_FLAGS} -g1 -fno-omit-frame-pointer)
  add_link_options(${DECO_SANITIZE_FLAGS})
  set(DECO_OPTIMIZE -O1)
endif()
