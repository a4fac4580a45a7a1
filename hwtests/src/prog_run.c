/* The two programs of prog_run.rs: a generator of packets that BPF_PROG_RUN calls, and a sink that counts and drops them.
 *
 * Built with clang when it is needed, without any header of libbpf or the kernel. What both are told and what they say is in
 * maps of 64-bit numbers; the names of their fields are those of prog_run.rs. */
typedef unsigned int u32;
typedef unsigned long long u64;

#define section(name) __attribute__((section(name), used))
#define array_of(val) \
    struct { \
        int (*type)[2]; /* BPF_MAP_TYPE_ARRAY */ \
        u32 *key; \
        val *value; \
        int (*max_entries)[1]; \
    }

/* linux/bpf.h */
struct xdp_md { u32 data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex; };
struct __sk_buff;
static void *(*const map_lookup_elem)(void *map, const void *key) = (void *)1;
static u64 (*const ktime_get_ns)(void) = (void *)5;
static long (*const redirect)(u32 ifindex, u64 flags) = (void *)23;
static long (*const skb_load_bytes)(const void *skb, u32 at, void *to, u32 len) = (void *)26;
static long (*const xdp_store_bytes)(struct xdp_md *ctx, u32 at, void *from, u32 len) = (void *)190;
enum { XDP_DROP = 1, TC_ACT_SHOT = 2 };

struct plan {
    u64 ifindex;      /* where packets go */
    u64 length;       /* bytes of each */
    u64 mask;         /* packet n is slot n & mask */
    u64 limit;        /* so many packets, then none */
    u64 pace;         /* nanoseconds of 1,024 packets */
    u64 window_begin; /* the sink counts those that come so long after the first was due */
    u64 window_end;   /* up to this by themselves */
    u64 behind;       /* so many packets late it catches up with; after more it goes on as if there had been no pause */
    u64 number_at;    /* where the generator writes a packet's number, four bytes; 0: nowhere */
    u64 look_at;      /* where the sink finds it; 0: it does not look */
};
struct slot { unsigned char bytes[1536]; };
struct sent { u64 packets, began, start; };
struct seen { u64 packets, in_window, bytes_in_window, first, looked; };

array_of(struct plan) plan section(".maps");
array_of(struct sent) sent section(".maps");
array_of(struct seen) seen section(".maps");
/* The loader makes these three as large as is wanted. */
array_of(struct slot) packets section(".maps");
array_of(u64) sent_at section(".maps");
array_of(u64) seen_at section(".maps");

section("xdp") int generate(struct xdp_md *ctx) {
    u32 zero = 0;
    struct plan *told = map_lookup_elem(&plan, &zero);
    struct sent *count = map_lookup_elem(&sent, &zero);
    if (!told || !count || count->packets >= told->limit) return XDP_DROP;
    u64 now = ktime_get_ns(), pace = told->pace | 1;
    /* The clock starts when the first call comes: what goes before takes milliseconds. */
    if (!count->began) count->began = count->start = now;
    u64 due = (now - count->start) * 1024 / pace;
    if (due < count->packets) return XDP_DROP;
    if (due - count->packets > told->behind) count->start += (due - count->packets) * pace / 1024;

    u32 at = (u32)(count->packets & told->mask), number = __builtin_bswap32((u32)count->packets);
    struct slot *slot = map_lookup_elem(&packets, &at);
    u32 length = (u32)told->length;
    if (!slot || length < 14 || length > sizeof(slot->bytes)) return XDP_DROP;
    if (xdp_store_bytes(ctx, 0, slot->bytes, length)) return XDP_DROP;
    if (told->number_at && xdp_store_bytes(ctx, (u32)told->number_at, &number, 4)) return XDP_DROP;
    if (told->look_at) {
        at = (u32)count->packets;
        u64 *stamp = map_lookup_elem(&sent_at, &at);
        if (stamp) *stamp = now;
    }
    count->packets++;
    return (int)redirect((u32)told->ifindex, 0);
}

section("classifier") int sink(struct __sk_buff *skb) {
    u32 zero = 0;
    struct plan *told = map_lookup_elem(&plan, &zero);
    struct seen *count = map_lookup_elem(&seen, &zero);
    struct sent *clock = map_lookup_elem(&sent, &zero);
    if (!told || !count || !clock) return TC_ACT_SHOT;
    u64 now = ktime_get_ns(), since = now - clock->began;
    __sync_fetch_and_add(&count->packets, 1);
    if (since >= told->window_begin && since < told->window_end) {
        __sync_fetch_and_add(&count->in_window, 1);
        __sync_fetch_and_add(&count->bytes_in_window, *(u32 *)skb);
    }
    if (told->look_at) {
        u32 number;
        if (skb_load_bytes(skb, (u32)told->look_at, &number, 4)) return TC_ACT_SHOT;
        number = __builtin_bswap32(number);
        /* Numbers begin with that of the first packet: ESP's go on from what was sent before. */
        if (!count->looked) count->first = number;
        count->looked = 1;
        number -= (u32)count->first;
        u64 *stamp = map_lookup_elem(&seen_at, &number);
        if (stamp && !*stamp) *stamp = now;
    }
    return TC_ACT_SHOT;
}

static const char terms[] section("license") = "Dual MIT/GPL";
