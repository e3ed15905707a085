/* A simulated model server: it answers as vLLM does at almost no cost, so that the proxy is measured.
 *
 *   mock PORT [FD_MAX]      prints "ready PORT" and serves on 127.0.0.1 until it is told to stop or its parent is gone
 *
 * A chat request is answered at once with a small JSON answer, or, with "stream":true, by one event per write: the role,
 * `max_tokens` content events with `seed` microseconds between them, then at once a finish event, usage if asked for, [DONE].
 * The two knobs travel in fields that every proxy passes on, one of them under its newer name at times. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define IN_MAX (256 * 1024)  /* one request; the benchmark's are about 1 KiB, what a proxy adds is small */
#define READS_MAX 256        /* events taken from the kernel at a time */

typedef struct {
    char *in;
    size_t have, room;
    uint64_t due_ns;
    uint32_t interval_us, left;
    uint32_t slot;  /* position in the heap + 1, 0 while nothing is being streamed */
    bool open, usage;
} Conn;

static Conn *conns;
static uint32_t *heap, heap_size;
static int poller;

#define HEAD "{\"id\":\"chatcmpl-8d1f3a6c2b7e4f50\",\"object\":\"chat.completion"
#define MADE ",\"created\":1760000000,\"model\":\"bench-model\","
#define DELTA(delta, finish) \
    "data: " HEAD ".chunk\"" MADE "\"choices\":[{\"index\":0,\"delta\":" delta ",\"logprobs\":null,\"finish_reason\":" finish "}]}\n\n"
static const char ROLE[] = DELTA("{\"role\":\"assistant\",\"content\":\"\"}", "null");
static const char WORD[] = DELTA("{\"content\":\" region\"}", "null");
static const char FINISH[] = DELTA("{}", "\"stop\"");
static const char USAGE[] = "data: " HEAD ".chunk\"" MADE
    "\"choices\":[],\"usage\":{\"prompt_tokens\":231,\"total_tokens\":263,\"completion_tokens\":32}}\n\n";
static const char DONE[] = "data: [DONE]\n\n";
static const char STREAM_HEAD[] = "HTTP/1.1 200 OK\r\ndate: Mon, 05 Oct 2026 10:00:00 GMT\r\nserver: uvicorn\r\n"
    "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
static const char ANSWER[] = HEAD "\"" MADE "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":"
    "\"Three regions serve this model, and the nearest one that has room answers first.\",\"refusal\":null,\"tool_calls\":[]},"
    "\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null}],"
    "\"usage\":{\"prompt_tokens\":231,\"total_tokens\":263,\"completion_tokens\":32},\"prompt_logprobs\":null}";
static const char MODELS[] = "{\"object\":\"list\",\"data\":[{\"id\":\"bench-model\",\"object\":\"model\",\"created\":1760000000,"
    "\"owned_by\":\"vllm\",\"root\":\"bench-model\",\"max_model_len\":8192}]}";
static const char ABOUT[] = "{\"model_path\":\"bench-model\",\"served_model_name\":\"bench-model\",\"model_id\":\"bench-model\","
    "\"is_generation\":true,\"version\":\"0.0\"}";
static const char METRICS[] = "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{model_name=\"bench-model\"} 0\n"
    "# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting{model_name=\"bench-model\"} 0\n"
    "# TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc{model_name=\"bench-model\"} 0\n";

/* What is sent whole, made once: a chunk with its size line, an answer with its head. */
typedef struct {
    char bytes[2048];
    size_t size;
} Packet;
static Packet role, word, finish, finish_usage, answer, models, about, metrics;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void add_chunk(Packet *p, const char *text) {
    p->size += (size_t)sprintf(p->bytes + p->size, "%zx\r\n%s\r\n", strlen(text), text);
}

static void make_answer(Packet *p, const char *type, const char *body) {
    p->size = (size_t)sprintf(p->bytes,
                              "HTTP/1.1 200 OK\r\ndate: Mon, 05 Oct 2026 10:00:00 GMT\r\nserver: uvicorn\r\n"
                              "content-length: %zu\r\ncontent-type: %s\r\n\r\n%s", strlen(body), type, body);
}

static void make_packets(void) {
    role.size = strlen(strcpy(role.bytes, STREAM_HEAD));
    add_chunk(&role, ROLE);
    add_chunk(&word, WORD);
    add_chunk(&finish, FINISH);
    add_chunk(&finish, DONE);
    strcat(finish.bytes, "0\r\n\r\n");
    finish.size += 5;
    add_chunk(&finish_usage, FINISH);
    add_chunk(&finish_usage, USAGE);
    add_chunk(&finish_usage, DONE);
    strcat(finish_usage.bytes, "0\r\n\r\n");
    finish_usage.size += 5;
    make_answer(&answer, "application/json", ANSWER);
    make_answer(&models, "application/json", MODELS);
    make_answer(&about, "application/json", ABOUT);
    make_answer(&metrics, "text/plain; version=0.0.4", METRICS);
}

/* The heap of streams by the time of their next event. */
static void place(uint32_t i, uint32_t fd) {
    heap[i] = fd;
    conns[fd].slot = i + 1;
}

static void settle(uint32_t i) {
    uint32_t fd = heap[i];
    while (i > 0 && conns[heap[(i - 1) / 2]].due_ns > conns[fd].due_ns) {
        place(i, heap[(i - 1) / 2]);
        i = (i - 1) / 2;
    }
    for (;;) {
        uint32_t child = 2 * i + 1;
        if (child >= heap_size) break;
        if (child + 1 < heap_size && conns[heap[child + 1]].due_ns < conns[heap[child]].due_ns) child++;
        if (conns[heap[child]].due_ns >= conns[fd].due_ns) break;
        place(i, heap[child]);
        i = child;
    }
    place(i, fd);
}

static void unschedule(Conn *c) {
    uint32_t i = c->slot - 1, last = heap[--heap_size];
    c->slot = 0;
    if (i == heap_size) return;
    place(i, last);
    settle(i);
}

static void drop(int fd) {
    Conn *c = &conns[fd];
    if (c->slot) unschedule(c);
    c->open = false;
    c->have = 0;
    close(fd);
}

/* A short write means that the proxy left megabytes unread. The stream breaks, and the client reports it. */
static bool put(int fd, const Packet *p) {
    if (send(fd, p->bytes, p->size, MSG_NOSIGNAL) == (ssize_t)p->size) return true;
    drop(fd);
    return false;
}

static uint32_t number_after(const char *body, const char *name, uint32_t otherwise) {
    const char *at = strstr(body, name);
    if (!at) return otherwise;
    at += strlen(name);
    while (*at == ' ' || *at == ':') at++;
    return (uint32_t)strtoul(at, NULL, 10);
}

static bool is_true(const char *body, const char *name) {
    const char *at = strstr(body, name);
    if (!at) return false;
    at += strlen(name);
    while (*at == ' ' || *at == ':') at++;
    return strncmp(at, "true", 4) == 0;
}

static void serve(int fd, const char *head, const char *body) {
    Conn *c = &conns[fd];
    if (strncmp(head, "GET", 3) == 0) {
        bool wants_models = strncmp(head + 4, "/v1/models", 10) == 0, wants_metrics = strncmp(head + 4, "/metrics", 8) == 0;
        put(fd, wants_models ? &models : wants_metrics ? &metrics : &about);
    } else if (!is_true(body, "\"stream\"")) {
        put(fd, &answer);
    } else if (put(fd, &role)) {
        c->usage = is_true(body, "\"include_usage\"");
        c->left = number_after(body, "\"max_tokens\"", number_after(body, "\"max_completion_tokens\"", 16));
        c->interval_us = number_after(body, "\"seed\"", 50000);
        c->due_ns = now_ns() + c->interval_us * 1000ull;
        heap[heap_size] = (uint32_t)fd;
        settle(heap_size++);
    }
}

/* Where a whole request ends, or 0 while it is incomplete. */
static size_t request_end(Conn *c, char **body) {
    char *end = memmem(c->in, c->have, "\r\n\r\n", 4);
    if (!end) return 0;
    size_t head_size = (size_t)(end - c->in) + 4;
    *body = end + 4;
    *end = 0;
    const char *length = strcasestr(c->in, "\r\ncontent-length:"), *coding = strcasestr(c->in, "\r\ntransfer-encoding:");
    size_t size = length ? strtoul(length + 17, NULL, 10) : 0;
    *end = '\r';
    if (coding) {
        char *last = memmem(*body, c->have - head_size, "\r\n0\r\n\r\n", 7);
        return last ? (size_t)(last - c->in) + 7 : 0;
    }
    return head_size + size <= c->have ? head_size + size : 0;
}

static void on_readable(int fd) {
    Conn *c = &conns[fd];
    if (c->room - c->have < 4096) {
        c->room = c->room ? c->room * 2 : 8192;
        if (c->room > IN_MAX || !(c->in = realloc(c->in, c->room))) return drop(fd);
    }
    ssize_t got = recv(fd, c->in + c->have, c->room - c->have - 1, 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got <= 0) return drop(fd);
    c->have += (size_t)got;
    char *body = NULL;
    size_t size;
    while (c->open && !c->slot && (size = request_end(c, &body)) > 0) {
        char kept = c->in[size];
        c->in[size] = 0;
        serve(fd, c->in, body);
        if (!c->open) return;
        c->in[size] = kept;
        memmove(c->in, c->in + size, c->have - size);
        c->have -= size;
    }
}

static void stream_on(uint64_t now) {
    while (heap_size && conns[heap[0]].due_ns <= now) {
        int fd = (int)heap[0];
        Conn *c = &conns[fd];
        if (c->left == 0) {
            unschedule(c);
            put(fd, c->usage ? &finish_usage : &finish);
            continue;
        }
        c->left--;
        c->due_ns += c->interval_us * 1000ull;
        settle(0);
        put(fd, &word);
    }
}

static void accept_all(int listener, uint32_t fd_max) {
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        if ((uint32_t)fd >= fd_max) {
            close(fd);
            continue;
        }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        conns[fd].open = true;
        struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(poller, EPOLL_CTL_ADD, fd, &e);
    }
}

static int listen_on(uint16_t port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), one = 1;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof at;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&at, size) || listen(fd, 4096)) die("mock: listen");
    getsockname(fd, (struct sockaddr *)&at, &size);
    printf("ready %d\n", ntohs(at.sin_port));
    fflush(stdout);
    return fd;
}

int main(int argc, char **argv) {
    uint32_t fd_max = argc > 2 ? (uint32_t)atoi(argv[2]) : 16384;
    struct rlimit files = {fd_max, fd_max};
    setrlimit(RLIMIT_NOFILE, &files);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    prctl(PR_SET_TIMERSLACK, 1000);
    conns = calloc(fd_max, sizeof *conns);
    heap = calloc(fd_max, sizeof *heap);
    make_packets();
    poller = epoll_create1(EPOLL_CLOEXEC);
    int listener = listen_on(argc > 1 ? (uint16_t)atoi(argv[1]) : 0);
    struct epoll_event e = {.events = EPOLLIN, .data.fd = listener}, ready[READS_MAX];
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &e);
    for (;;) {
        struct timespec wait, *until = NULL;
        if (heap_size) {
            uint64_t now = now_ns(), due = conns[heap[0]].due_ns, left = due > now ? due - now : 0;
            wait = (struct timespec){(time_t)(left / 1000000000u), (long)(left % 1000000000u)};
            until = &wait;
        }
        int n = epoll_pwait2(poller, ready, READS_MAX, until, NULL);
        if (n < 0 && errno != EINTR) die("mock: epoll");
        for (int i = 0; i < n; i++) {
            int fd = ready[i].data.fd;
            if (fd == listener) accept_all(listener, fd_max);
            else if (conns[fd].open) on_readable(fd);
        }
        if (heap_size) stream_on(now_ns());
    }
}
