# Fails if the library needs Python or libtorch_cuda: it must load in any LibTorch process.
find_program(READELF readelf REQUIRED)
execute_process(COMMAND ${READELF} -d ${LIBRARY} OUTPUT_VARIABLE dynamic COMMAND_ERROR_IS_FATAL ANY)
if(NOT dynamic MATCHES "NEEDED.*libtorch_cpu")
  message(FATAL_ERROR "${LIBRARY}: no libtorch_cpu among its needs:\n${dynamic}")
endif()
if(dynamic MATCHES "NEEDED[^\n]*(python|torch_cuda)")
  message(FATAL_ERROR "${LIBRARY} needs ${CMAKE_MATCH_1}:\n${dynamic}")
endif()
