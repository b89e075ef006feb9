/* A program that takes the place of another and then does nothing at all. */
#include <unistd.h>

int main(void) {
    for (;;)
        pause();
}
