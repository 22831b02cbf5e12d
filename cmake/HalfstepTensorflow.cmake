# Finds a TensorFlow by its Python: headers and flags are what tf.sysconfig says.
#
#   HALFSTEP_TF_PYTHON   the Python that has TensorFlow (default: python3)
#
# Gives the target halfstep_tensorflow and HALFSTEP_TF_VERSION.
function(halfstep_find_tensorflow)
  set(HALFSTEP_TF_PYTHON python3 CACHE FILEPATH "Python that has TensorFlow")
  execute_process(
    COMMAND ${CMAKE_COMMAND} -E env TF_CPP_MIN_LOG_LEVEL=3 ${HALFSTEP_TF_PYTHON} -c
      "import tensorflow as tf; s = tf.sysconfig; print('halfstep', tf.__version__, *s.get_compile_flags(), '--', *s.get_link_flags(), sep=';')"
    OUTPUT_VARIABLE output ERROR_VARIABLE errors RESULT_VARIABLE result OUTPUT_STRIP_TRAILING_WHITESPACE)
  string(REGEX MATCH "halfstep;[^\n]*" flags "${output}")
  if(NOT result EQUAL 0 OR NOT flags)
    message(FATAL_ERROR "halfstep: HALFSTEP_TF=ON, but ${HALFSTEP_TF_PYTHON} cannot import tensorflow. "
      "pip install tensorflow, or pass -DHALFSTEP_TF_PYTHON=<python that has it>\n${errors}")
  endif()
  list(POP_FRONT flags ignored version)
  list(FIND flags "--" border)
  list(SUBLIST flags 0 ${border} compile_flags)
  math(EXPR border "${border} + 1")
  list(SUBLIST flags ${border} -1 link_flags)

  add_library(halfstep_tensorflow INTERFACE)
  foreach(flag IN LISTS compile_flags)
    if(flag MATCHES "^-I(.*)")
      target_include_directories(halfstep_tensorflow SYSTEM INTERFACE ${CMAKE_MATCH_1})
    elseif(flag MATCHES "std=c\\+\\+")
      # The C headers take any standard; halfstep's own is newer than TensorFlow's.
    else()
      target_compile_options(halfstep_tensorflow INTERFACE ${flag})
    endif()
  endforeach()
  target_link_libraries(halfstep_tensorflow INTERFACE ${link_flags})
  set(HALFSTEP_TF_VERSION ${version} PARENT_SCOPE)
endfunction()
