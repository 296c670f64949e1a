// The row loops for one instruction set; CMakeLists.txt sets the compiler flags of this file.
#define PYUNICTOKENS_LEVEL avx512
#include "all_rows.h"
