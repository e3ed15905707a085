/* The client: sends one prepared request over and over and checks every answer.
 *
 *   load --port N --request FILE --mode closed|rate|stream --conns N --warm-ms N --window-ms N [options]
 *     closed   every connection sends its next request when it has its answer
 *     rate     --rate N requests a second, evenly spaced, over --conns connections; a request's latency counts from the
 *              instant it was due, so that waiting behind a slow one is not forgotten
 *     stream   every connection opens one stream (opening them takes --spread-ms) and reads it to its end
 *   --length N      the body's size (closed, rate), 0 to accept any        --events N   events of one stream, 0 for any
 *   --tls           over TLS, the certificate not checked
 *
 * Prints a JSON line when the measured window opens, one when it closes (so that the caller can read the proxy's CPU time
 * at both), and one with all results. A wrong status, length, event count or ending is an error; ten of them end the run. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#ifdef WITH_TLS  /* the few names used of libssl's stable interface, so that its headers need not be installed */
typedef struct ssl_st SSL;
typedef struct ssl_ctx_st SSL_CTX;
const void *TLS_client_method(void);
SSL_CTX *SSL_CTX_new(const void *);
SSL *SSL_new(SSL_CTX *);
int SSL_set_fd(SSL *, int), SSL_connect(SSL *), SSL_read(SSL *, void *, int), SSL_write(SSL *, const void *, int);
int SSL_get_error(const SSL *, int);
void SSL_free(SSL *);
static SSL_CTX *tls;
#endif

#define HEAD_MAX 16384
#define READS_MAX 128
#define ERRORS_MAX 10
#define TAIL 24             /* the end of a body that is kept for the check */
#define LATENCIES_MAX 4000000
#define SETTLE_NS 300000000ull

enum mode { CLOSED, RATE, STREAM };
enum part { HEAD, LENGTH, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER, TO_THE_END };

typedef struct {
    int fd;
    enum part part;
    bool busy, close_after, started;
    char head[HEAD_MAX], tail[TAIL], line[32];
    size_t head_have, line_have, left, body;
    uint32_t events;
    char last;
    uint64_t due_ns;
#ifdef WITH_TLS
    SSL *ssl;
#endif
} Conn;

static struct {
    enum mode mode;
    int port, conns, warm_ms, window_ms, rate, spread_ms, tls;
    size_t length;
    uint32_t events;
    char *request;
    size_t request_size;
} ask = {.conns = 64, .warm_ms = 500, .window_ms = 3000, .rate = 200, .spread_ms = 1000};

static Conn *conns;
static int poller, idle_count, *idle, busy_count, errors;
static uint64_t requests, events, opened, started_streams, finished;
static uint32_t *latencies_us, latency_count;
static char first_error[512];
static bool counting;
static uint64_t window_requests, window_events, window_ns;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void die(const char *what) {
    perror(what);
    exit(2);
}

static void print_result(void);

static void fail(Conn *c, const char *why) {
    if (!errors++)
        snprintf(first_error, sizeof first_error, "%s; the answer began: %.*s", why, (int)(c->head_have < 200 ? c->head_have : 200), c->head);
    if (errors >= ERRORS_MAX) {
        print_result();
        exit(1);
    }
}

static void hang_up(Conn *c) {
#ifdef WITH_TLS
    if (c->ssl) SSL_free(c->ssl);
    c->ssl = NULL;
#endif
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
}

static void dial(Conn *c) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)ask.port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    /* Block until it is connected: over loopback that is immediate, and saves a state. */
    if (connect(c->fd, (struct sockaddr *)&at, sizeof at)) die("load: connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
#ifdef WITH_TLS
    if (ask.tls) {
        c->ssl = SSL_new(tls);
        SSL_set_fd(c->ssl, c->fd);
        if (SSL_connect(c->ssl) != 1) die("load: TLS handshake");
    }
#endif
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &e);
    opened++;
}

static bool put(Conn *c) {
#ifdef WITH_TLS
    if (c->ssl) return SSL_write(c->ssl, ask.request, (int)ask.request_size) == (int)ask.request_size;
#endif
    return send(c->fd, ask.request, ask.request_size, MSG_NOSIGNAL) == (ssize_t)ask.request_size;
}

static void send_request(Conn *c, uint64_t due_ns) {
    if (c->fd < 0) dial(c);
    c->busy = true;
    c->part = HEAD;
    c->close_after = c->started = false;
    c->head_have = c->line_have = c->body = 0;
    c->events = 0;
    c->last = 0;
    c->due_ns = due_ns;
    busy_count++;
    if (put(c)) return;
    /* The other side closed it between two requests, as keep-alive allows: try once on a new connection. */
    hang_up(c);
    dial(c);
    if (!put(c)) fail(c, "the request could not be sent");
}

static void on_answer(Conn *c) {
    uint64_t now = now_ns();
    bool right = ask.mode == STREAM ? memcmp(c->tail + TAIL - 14, "data: [DONE]\n\n", 14) == 0 : c->tail[TAIL - 1] == '}';
    char why[160];
    snprintf(why, sizeof why, "a body of %zu bytes and %u events does not end as it should or is not as long", c->body, c->events);
    if (!right || (ask.length && c->body != ask.length) || (ask.events && c->events != ask.events)) fail(c, why);
    c->busy = false;
    busy_count--;
    requests++;
    if (counting && ask.mode != STREAM && latency_count < LATENCIES_MAX) latencies_us[latency_count++] = (uint32_t)((now - c->due_ns) / 1000);
    if (c->close_after) hang_up(c);
    if (ask.mode == STREAM) {
        finished++;
        hang_up(c);
    } else if (ask.mode == CLOSED && (counting || !window_ns)) {
        send_request(c, now);
    } else {
        idle[idle_count++] = (int)(c - conns);
    }
}

static void read_head(Conn *c) {
    c->head[c->head_have] = 0;
    int status = 0;
    sscanf(c->head, "HTTP/1.%*d %d", &status);
    if (status != 200) fail(c, "the status is not 200");
    char *length = strcasestr(c->head, "\r\ncontent-length:");
    bool chunked = strcasestr(c->head, "\r\ntransfer-encoding: chunked") != NULL;
    c->close_after = strcasestr(c->head, "\r\nconnection: close") != NULL;
    c->left = length ? strtoul(length + 17, NULL, 10) : 0;
    c->part = chunked ? CHUNK_SIZE : length ? LENGTH : TO_THE_END;
}

static void see_body(Conn *c, const char *data, size_t size) {
    c->body += size;
    if (ask.mode == STREAM) {
        const char *at = data, *end = data + size;
        while ((at = memchr(at, '\n', (size_t)(end - at)))) {
            if ((at > data ? at[-1] : c->last) == '\n') {
                c->events++;
                events++;
            }
            at++;
        }
        c->last = end[-1];
        if (!c->started) {
            c->started = true;
            started_streams++;
        }
    }
    if (size >= TAIL) memcpy(c->tail, data + size - TAIL, TAIL);
    else {
        memmove(c->tail, c->tail + size, TAIL - size);
        memcpy(c->tail + TAIL - size, data, size);
    }
}

/* Takes one piece of the answer from `data`; returns how many bytes it was. */
static size_t take(Conn *c, const char *data, size_t size) {
    const char *newline;
    size_t n = size;
    switch (c->part) {
    case HEAD: {
        size_t before = c->head_have, room = HEAD_MAX - 1 - before;
        if (n > room) n = room;
        memcpy(c->head + before, data, n);
        c->head_have += n;
        size_t from = before > 3 ? before - 3 : 0;
        char *end = memmem(c->head + from, c->head_have - from, "\r\n\r\n", 4);
        if (!end) {
            if (n == room) fail(c, "the head of the answer is too long");
            return n;
        }
        n = (size_t)(end + 4 - c->head) - before;
        c->head_have = before + n;
        read_head(c);
        if (c->part == LENGTH && c->left == 0) on_answer(c);
        return n;
    }
    case LENGTH:
    case CHUNK_DATA:
        if (n > c->left) n = c->left;
        see_body(c, data, n);
        c->left -= n;
        if (c->left == 0 && c->part == LENGTH) on_answer(c);
        else if (c->left == 0) c->part = CHUNK_END;
        return n;
    case CHUNK_SIZE:
    case CHUNK_END:
    case TRAILER:
        newline = memchr(data, '\n', size);
        if (newline) n = (size_t)(newline + 1 - data);
        size_t kept = n < sizeof c->line - 1 - c->line_have ? n : sizeof c->line - 1 - c->line_have;
        memcpy(c->line + c->line_have, data, kept);
        c->line_have += kept;
        if (!newline) return n;
        c->line[c->line_have] = 0;
        bool empty = c->line_have <= 2;
        c->line_have = 0;
        if (c->part == CHUNK_END) c->part = CHUNK_SIZE;
        else if (c->part == CHUNK_SIZE) {
            c->left = strtoul(c->line, NULL, 16);
            c->part = c->left ? CHUNK_DATA : TRAILER;
        } else if (empty) on_answer(c);
        return n;
    case TO_THE_END:
        see_body(c, data, n);
    }
    return n;
}

static ssize_t receive(Conn *c, char *into, size_t room) {
#ifdef WITH_TLS
    if (c->ssl) {
        int got = SSL_read(c->ssl, into, (int)room);
        if (got > 0) return got;
        int error = SSL_get_error(c->ssl, got);
        if (error == 2 || error == 3) { /* wants to read or write more */
            errno = EAGAIN;
            return -1;
        }
        return 0;
    }
#endif
    return recv(c->fd, into, room, 0);
}

static void on_readable(Conn *c) {
    static char data[65536];
    for (;;) {
        ssize_t got = receive(c, data, sizeof data);
        if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (got <= 0) {
            bool whole = c->busy && c->part == TO_THE_END;
            c->close_after = true;
            if (whole) on_answer(c);
            else {
                if (c->busy) fail(c, "the connection was closed in the middle of an answer");
                if (c->busy) {
                    c->busy = false;
                    busy_count--;
                    finished++;
                    if (ask.mode != STREAM) idle[idle_count++] = (int)(c - conns);
                }
                hang_up(c);
            }
            return;
        }
        for (ssize_t at = 0; at < got && c->fd >= 0;) {
            if (!c->busy) {
                fail(c, "bytes arrived without a request");
                break;
            }
            at += (ssize_t)take(c, data + at, (size_t)(got - at));
        }
        if (c->fd < 0) return;
#ifdef WITH_TLS
        if (c->ssl) continue; /* libssl may hold bytes that the poller cannot see */
#endif
        return;
    }
}

static void print_mark(const char *name) {
    printf("{\"mark\":\"%s\",\"requests\":%llu,\"events\":%llu}\n", name, (unsigned long long)requests, (unsigned long long)events);
    fflush(stdout);
}

static int by_size(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static double percentile_us(double share) {
    return latency_count ? latencies_us[(uint32_t)(share * (latency_count - 1))] : 0;
}

static void print_text(const char *text) {
    putchar('"');
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') putchar('\\');
        if ((unsigned char)*text >= ' ') putchar(*text);
        else putchar(' ');
    }
    putchar('"');
}

static void print_result(void) {
    qsort(latencies_us, latency_count, sizeof *latencies_us, by_size);
    printf("{\"mark\":\"done\",\"requests\":%llu,\"events\":%llu,\"window_requests\":%llu,\"window_events\":%llu,"
           "\"window_s\":%.6f,\"opened\":%llu,\"p50_us\":%.0f,\"p90_us\":%.0f,\"p99_us\":%.0f,\"max_us\":%.0f,\"errors\":%d,\"error\":",
           (unsigned long long)requests, (unsigned long long)events, (unsigned long long)window_requests,
           (unsigned long long)window_events, (double)window_ns / 1e9, (unsigned long long)opened, percentile_us(0.5),
           percentile_us(0.9), percentile_us(0.99), percentile_us(1), errors);
    print_text(first_error);
    printf("}\n");
    fflush(stdout);
}

static void read_request(const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f) die(path);
    ask.request = malloc(1 << 20);
    ask.request_size = fread(ask.request, 1, 1 << 20, f);
    fclose(f);
}

static void read_arguments(int argc, char **argv) {
    static const struct option options[] = {
        {"port", 1, 0, 'p'}, {"request", 1, 0, 'q'}, {"mode", 1, 0, 'm'}, {"conns", 1, 0, 'c'}, {"warm-ms", 1, 0, 'w'},
        {"window-ms", 1, 0, 't'}, {"rate", 1, 0, 'r'}, {"spread-ms", 1, 0, 's'}, {"length", 1, 0, 'l'},
        {"events", 1, 0, 'e'}, {"tls", 0, 0, 'x'}, {0, 0, 0, 0}};
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) switch (option) {
        case 'p': ask.port = atoi(optarg); break;
        case 'q': read_request(optarg); break;
        case 'm': ask.mode = *optarg == 'c' ? CLOSED : *optarg == 'r' ? RATE : STREAM; break;
        case 'c': ask.conns = atoi(optarg); break;
        case 'w': ask.warm_ms = atoi(optarg); break;
        case 't': ask.window_ms = atoi(optarg); break;
        case 'r': ask.rate = atoi(optarg); break;
        case 's': ask.spread_ms = atoi(optarg); break;
        case 'l': ask.length = strtoul(optarg, NULL, 10); break;
        case 'e': ask.events = (uint32_t)atoi(optarg); break;
        case 'x': ask.tls = 1; break;
        default: exit(2);
    }
    if (!ask.port || !ask.request) {
        fprintf(stderr, "load: --port and --request are needed\n");
        exit(2);
    }
}

/* When the measured window opens and closes. Streams: once all have begun and settled; else: after the warm-up. */
static uint64_t move_window(uint64_t now, uint64_t began) {
    static uint64_t opens, closes;
    if (!opens && ask.mode != STREAM) opens = began + (uint64_t)ask.warm_ms * 1000000u;
    if (!opens && started_streams == (uint64_t)ask.conns) opens = now + SETTLE_NS;
    if (!opens) return now + 100000000u;
    if (!closes) {
        if (now < opens) return opens;
        closes = now + (uint64_t)ask.window_ms * 1000000u;
        counting = true;
        window_requests = requests, window_events = events, window_ns = now;
        print_mark("begin");
    }
    if (counting && now >= closes) {
        counting = false;
        window_requests = requests - window_requests, window_events = events - window_events, window_ns = now - window_ns;
        print_mark("end");
    }
    return counting ? closes : UINT64_MAX;
}

static bool window_done(void) { return window_ns && !counting; }

static void open_next_streams(uint64_t now, uint64_t began, uint64_t *wake) {
    static int begun;
    for (; begun < ask.conns; begun++) {
        uint64_t due = began + (uint64_t)ask.spread_ms * 1000000u / (uint64_t)ask.conns * (uint64_t)begun;
        if (due > now) {
            if (due < *wake) *wake = due;
            return;
        }
        send_request(&conns[begun], due);
    }
}

static void send_due(uint64_t now, uint64_t began, uint64_t *wake) {
    static uint64_t sent;
    while (!window_done()) {
        uint64_t due = began + sent * 1000000000u / (uint64_t)ask.rate;
        if (due > now) {
            if (due < *wake) *wake = due;
            return;
        }
        if (!idle_count) return; /* all are waiting: the next answer frees one, and the lateness counts */
        send_request(&conns[idle[--idle_count]], due);
        sent++;
    }
}

int main(int argc, char **argv) {
    read_arguments(argc, argv);
    prctl(PR_SET_PDEATHSIG, 9);
    prctl(PR_SET_TIMERSLACK, 1000);
#ifdef WITH_TLS
    if (ask.tls) tls = SSL_CTX_new(TLS_client_method());
#else
    if (ask.tls) {
        fprintf(stderr, "load: built without TLS: libssl.so.3 was not found\n");
        return 2;
    }
#endif
    conns = calloc((size_t)ask.conns, sizeof *conns);
    idle = calloc((size_t)ask.conns + 1, sizeof *idle);
    latencies_us = malloc(LATENCIES_MAX * sizeof *latencies_us);
    poller = epoll_create1(EPOLL_CLOEXEC);
    for (int i = 0; i < ask.conns; i++) conns[i].fd = -1;
    if (ask.mode != STREAM)
        for (int i = 0; i < ask.conns; i++) {
            dial(&conns[i]);
            if (ask.mode == RATE) idle[idle_count++] = i;
        }
    uint64_t began = now_ns(), give_up = began + ((uint64_t)ask.warm_ms + (uint64_t)ask.window_ms + (uint64_t)ask.spread_ms + 60000u) * 1000000u;
    if (ask.mode == CLOSED)
        for (int i = 0; i < ask.conns; i++) send_request(&conns[i], began);
    struct epoll_event ready[READS_MAX];
    while (!(window_done() && busy_count == 0 && (ask.mode != STREAM || finished == (uint64_t)ask.conns))) {
        uint64_t now = now_ns(), wake = move_window(now, began);
        if (now > give_up) {
            errors++;
            snprintf(first_error, sizeof first_error, "not done in time: %d answers are missing", busy_count);
            break;
        }
        if (ask.mode == STREAM) open_next_streams(now, began, &wake);
        if (ask.mode == RATE) send_due(now, began, &wake);
        now = now_ns();
        uint64_t left = wake == UINT64_MAX ? 100000000u : wake > now ? wake - now : 0;
        struct timespec wait = {(time_t)(left / 1000000000u), (long)(left % 1000000000u)};
        int n = epoll_pwait2(poller, ready, READS_MAX, &wait, NULL);
        if (n < 0 && errno != EINTR) die("load: epoll");
        for (int i = 0; i < n; i++) on_readable(ready[i].data.ptr);
    }
    print_result();
    return errors > 0;
}
