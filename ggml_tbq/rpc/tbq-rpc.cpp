// SPDX-License-Identifier: MIT
#include "tbq-rpc.h"

#include "ggml-impl.h"
#include "tbq-ggml.h"
#include "tbq.h"

#include <chrono>
#include <cstring>

#ifndef _WIN32
#include <cerrno>
#include <sys/ioctl.h>
#endif

static constexpr uint64_t TBQ_RPC_BUSY = UINT64_MAX;

#pragma pack(push, 1)
// All but the last field must agree.
struct tbq_rpc_hello {
    char     magic[8];
    uint32_t format;     // TBQ_FORMAT_VERSION
    uint32_t operations; // TBQ_RPC_VERSION
    uint32_t n_ops;      // GGML_OP_COUNT: the numbers of operations change with it
    uint32_t n_types;    // GGML_TYPE_COUNT
    char     version[16];
};
#pragma pack(pop)

static tbq_rpc_hello own_hello() {
    tbq_rpc_hello hello = { { 't', 'b', 'q', '-', 'r', 'p', 'c', 0 },
                            TBQ_FORMAT_VERSION,
                            TBQ_RPC_VERSION,
                            GGML_OP_COUNT,
                            GGML_TYPE_COUNT,
                            {} };
    strncpy(hello.version, tbq_version(), sizeof(hello.version) - 1);
    return hello;
}

static bool same_versions(const tbq_rpc_hello & a, const tbq_rpc_hello & b) {
    return memcmp(&a, &b, offsetof(tbq_rpc_hello, version)) == 0;
}

// --- the client's side -----------------------------------------------------------------------------------------------

bool tbq_rpc_greet(socket_t & socket, const char * endpoint) {
    const tbq_rpc_hello own     = own_hello();
    const uint8_t       command = TBQ_RPC_HELLO;
    uint64_t            size    = sizeof(own);
    tbq_rpc_hello       other   = {};
    if (!socket.send_data(&command, 1) || !socket.send_data(&size, sizeof(size)) || !socket.send_data(&own, size) ||
        !socket.flush() || !socket.recv_data(&size, sizeof(size)) || size != sizeof(other) ||
        !socket.recv_data(&other, sizeof(other)) || memcmp(own.magic, other.magic, sizeof(own.magic)) != 0) {
        GGML_LOG_ERROR(
            "%s is not an RPC server of ggml-tbq, so it does not know the tbq types; start ggml-rpc-server of "
            "ggml-tbq %s there\n",
            endpoint, own.version);
        return false;
    }
    if (!same_versions(own, other)) {
        other.version[sizeof(other.version) - 1] = 0;
        GGML_LOG_ERROR(
            "RPC server %s runs ggml-tbq %s with version %u.%u.%u.%u of the format, the operations and llama.cpp; this is "
            "ggml-tbq %s with %u.%u.%u.%u, and both must agree\n",
            endpoint, other.version, other.format, other.operations, other.n_ops, other.n_types, own.version,
            own.format, own.operations, own.n_ops, own.n_types);
        return false;
    }
    return true;
}

bool tbq_rpc_recv_size(socket_t & socket, uint64_t & size) {
    do {
        if (!socket.recv_data(&size, sizeof(size))) {
            return false;
        }
    } while (size == TBQ_RPC_BUSY);
    return true;
}

int tbq_rpc_waiting(int socket) {
    int bytes = -1;
#ifndef _WIN32
    if (ioctl(socket, FIONREAD, &bytes) != 0) {
        bytes = -1;
    }
#else
    (void) socket;
#endif
    return bytes;
}

bool tbq_rpc_is_busy(int socket, int & waiting) {
#ifndef _WIN32
    if (errno != EAGAIN && errno != EWOULDBLOCK) {
        return false;
    }
    const int before = waiting;
    waiting          = tbq_rpc_waiting(socket);
    return waiting > before;
#else
    (void) socket;
    (void) waiting;
    return false;
#endif
}

template <typename T> static void append(std::string & key, const T & value) {
    key.append(reinterpret_cast<const char *>(&value), sizeof(value));
}

static int64_t powers_of_two(int64_t n) {
    const int64_t lowest = n & -n;
    return lowest < 256 ? lowest : 256;
}

static void append_shape(std::string & key, const ggml_tensor * op, const ggml_tensor * t) {
    append(key, t->type);
    append(key, t->ne[0]);
    append(key, t->nb[0]);
    for (int i = 1; i < GGML_MAX_DIMS; i++) {
        append(key, t->ne[i] < 256 ? t->ne[i] : 256 + powers_of_two(t->ne[i]));
        append(key, powers_of_two(t->nb[i]));
        append(key, t->ne[i] == op->ne[i]);
    }
    append(key, ggml_is_contiguous(t));
    append(key, ggml_is_contiguous_1(t));
    append(key, ggml_is_contiguous_2(t));
    append(key, ggml_is_permuted(t));
    append(key, ggml_is_transposed(t));
}

bool tbq_rpc_answers::supports(const ggml_tensor * op, const std::function<bool(bool & answered)> & ask) {
    if (ggml_op_is_empty(op->op)) {
        return true;
    }
    std::string key;
    append(key, op->op);
    if (op->op != GGML_OP_SET_ROWS) { // where its slots begin changes with the cells
        append(key, op->op_params);
    }
    append_shape(key, op, op);
    for (int i = 0; i < GGML_MAX_SRC; i++) {
        if (op->src[i]) {
            append(key, i);
            append_shape(key, op, op->src[i]);
        }
    }
    std::lock_guard<std::mutex> lock(mutex_);
    const auto                  found = answers_.find(key);
    if (found != answers_.end()) {
        return found->second;
    }
    bool       answered = false;
    const bool answer   = ask(answered);
    if (answered) {
        answers_[key] = answer;
    }
    return answer;
}

// --- the server's side -----------------------------------------------------------------------------------------------

bool tbq_rpc_welcome(socket_t & socket) {
    const tbq_rpc_hello own   = own_hello();
    tbq_rpc_hello       other = {};
    uint64_t            size  = 0;
    if (!socket.recv_data(&size, sizeof(size)) || size != sizeof(other) || !socket.recv_data(&other, sizeof(other))) {
        return false;
    }
    size = sizeof(own);
    return socket.send_data(&size, sizeof(size)) && socket.send_data(&own, sizeof(own)) && socket.flush() &&
           same_versions(own, other);
}

bool tbq_rpc_valid_tensor(uint32_t type, const uint32_t * ne, const uint32_t * nb) {
    const ggml_type t = (ggml_type) type;
    if (t != GGML_TYPE_TBQ8_0 && t != GGML_TYPE_TBQ8_ACT && !ggml_is_tbq(t)) {
        return true;
    }
    // kernels read whole blocks, one behind the other; what is inside of a dot product is nobody's tensor
    return t != GGML_TYPE_TBQ8_ACT && ne[0] % ggml_blck_size(t) == 0 && nb[0] == ggml_type_size(t);
}

// Whether t, if it is there, has floats for each value of a row.
static bool fits_row(const ggml_tensor * t, const ggml_tensor * row) {
    return !t || (t->type == GGML_TYPE_F32 && t->ne[0] == row->ne[0] && ggml_is_contiguous(t));
}

bool tbq_rpc_valid_op(const ggml_tensor * op) {
    const ggml_tensor * const * src = op->src;
    if (op->op == GGML_OP_FLASH_ATTN_EXT) {
        return src[0] && src[1] && src[2] && tbq_ggml_flash_attn_ext_valid(op);
    }
    if (op->op == GGML_OP_SET_ROWS && ggml_is_tbq(op->type)) {
        const bool exact =
            !src[5] || (src[6] && src[5]->type == GGML_TYPE_TBQ8_0 && src[5]->ne[0] == op->ne[0] &&
                        src[6]->type == GGML_TYPE_I32 && ggml_is_contiguous(src[6]) && op->op_params[0] >= 0 &&
                        src[0] && op->op_params[0] + src[0]->ne[1] <= ggml_nelements(src[6]));
        return src[0] && src[1] && src[0]->ne[0] == op->ne[0] && fits_row(src[3], op) && fits_row(src[4], op) && exact;
    }
    if (op->op == GGML_OP_CONCAT && op->type == GGML_TYPE_TBQ8_0) {
        return src[0] && src[1] && src[0]->type == GGML_TYPE_TBQ8_0 && src[0]->ne[0] == op->ne[0] &&
               src[1]->ne[0] == op->ne[0] && src[0]->ne[2] == op->ne[2] && src[1]->ne[2] == op->ne[2] &&
               src[0]->ne[1] + src[1]->ne[1] == op->ne[1] && fits_row(src[2], op);
    }
    return true;
}

tbq_rpc_heartbeat::~tbq_rpc_heartbeat() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        ended_ = true;
    }
    changed_.notify_all();
    if (thread_.joinable()) {
        thread_.join();
    }
}

void tbq_rpc_heartbeat::start() {
    if (!thread_.joinable()) {
        thread_ = std::thread([this] { run(); });
    }
}

void tbq_rpc_heartbeat::work() {
    std::lock_guard<std::mutex> lock(mutex_);
    working_ = true;
}

void tbq_rpc_heartbeat::rest() {
    std::lock_guard<std::mutex> lock(mutex_);
    working_ = false;
}

void tbq_rpc_heartbeat::run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!changed_.wait_for(lock, std::chrono::seconds(TBQ_RPC_HEARTBEAT), [this] { return ended_; })) {
        if (!working_) {
            continue;
        }
        lock.unlock();
        {
            // not in the middle of an answer
            std::lock_guard<std::mutex> message(socket_.send_mutex);
            socket_.send_data(&TBQ_RPC_BUSY, sizeof(TBQ_RPC_BUSY));
            socket_.flush();
        }
        lock.lock();
    }
}
