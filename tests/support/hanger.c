/* A program that replaces another one and sleeps for ever. */
#include <unistd.h>

int main(void) {
    for (;;)
        pause();
}
