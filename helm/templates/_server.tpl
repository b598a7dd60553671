{{/* The pod that serves: (dict "root" $ "role" …). server answers requests; follower holds a part of its model. */}}
{{- define "lowbit.serverPod" -}}
{{- $ := .root -}}
metadata:
  labels:
    {{- include "lowbit.labels" (list $ .role $.Values.podLabels) | nindent 4 }}
  annotations:
    checksum/settings: {{ include "lowbit.settings" $ | sha256sum }}
    {{- if eq .role "follower" }}
    {{- include "lowbit.checkovSkips" (list $ "CKV_K8S_8:follower" "CKV_K8S_9:follower" "CKV_K8S_11") | indent 4 }}
    {{- else if include "lowbit.multiNode" $ }}
    {{- include "lowbit.checkovSkips" (list $ "CKV_K8S_11") | indent 4 }}
    {{- end }}
    {{- with $.Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "lowbit.podBase" $ | nindent 2 }}
  {{- if $.Values.hostNetwork }}
  hostNetwork: true
  {{- end }}
  terminationGracePeriodSeconds: {{ int $.Values.shutdown.terminationGracePeriodS }}
  {{- with include "lowbit.initContainers" $ | trim }}
  initContainers:
    {{- . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ .role }}
      args: [serve]
      {{- include "lowbit.container" (dict "root" $ "settings" true "env" (include "lowbit.serverEnv" $) "mounts" (include "lowbit.serverMounts" $)) | nindent 6 }}
      {{- if eq .role "server" }}
      ports:
        - name: http
          containerPort: 8000
      {{- include "lowbit.probes" $ | nindent 6 }}
      {{- end }}
      lifecycle:
        preStop:
          exec:
            command: [sleep, "{{ int $.Values.shutdown.preStopS }}"]
      resources:
        {{- include "lowbit.resources" (dict "resources" $.Values.resources "gpus" $.Values.gpu.count "resourceName" $.Values.gpu.resourceName) | nindent 8 }}
    {{- if eq .role "server" }}
    {{- with $.Values.sidecars }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- end }}
  volumes:
    {{- include "lowbit.volumes" (dict "root" $ "tmp" $.Values.volumes.tmp "cache" $.Values.volumes.cache "claim" $.Values.volumes.cacheClaim "own" (include "lowbit.serverVolumes" $)) | nindent 4 }}
  {{- include "lowbit.resourceClaims" (list $ $.Values.resources) | nindent 2 }}
  {{- with $.Values.gpu.runtimeClassName }}
  runtimeClassName: {{ . | quote }}
  {{- end }}
  {{- with $.Values.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- with $.Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if eq .role "server" }}
  {{- include "lowbit.spread" $ | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* A LeaderWorkerSet puts LWS_… before these, so that they can refer to it. */}}
{{- define "lowbit.serverEnv" -}}
- {name: HF_HUB_OFFLINE, value: "1"}
- {name: VLLM_NO_USAGE_STATS, value: "1"}
{{- if include "lowbit.multiNode" . }}
- {name: LOWBIT_NODE_RANK, value: $(LWS_WORKER_INDEX)}
- {name: LOWBIT_MASTER_ADDR, value: $(LWS_LEADER_ADDRESS)}
- {name: VLLM_HOST_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
{{- end }}
{{- end -}}

{{- define "lowbit.serverVolumes" -}}
- name: checkpoint
  {{- if .Values.checkpoint.existingClaim }}
  persistentVolumeClaim: {claimName: {{ .Values.checkpoint.existingClaim | quote }}, readOnly: true}
  {{- else if .Values.checkpoint.hub.id }}
  emptyDir: {sizeLimit: {{ add (int .Values.checkpoint.sizeGib) 1 }}Gi}
  {{- else }}
  image:
    reference: {{ .Values.checkpoint.image.reference | quote }}
    pullPolicy: {{ .Values.checkpoint.image.pullPolicy }}
  {{- end }}
- name: shared-memory
  emptyDir: {medium: Memory, sizeLimit: {{ include "lowbit.setting" .Values.volumes.sharedMemory | quote }}}
{{- if .Values.checkpoint.hub.id }}
{{- include "lowbit.hubVolume" (list . .Values.checkpoint.hub) }}
{{- end }}
{{- with include "lowbit.keysSecret" . }}
{{ include "lowbit.secretVolume" (list $ "api-keys" .) }}
{{- end }}
{{- with .Values.tls.existingSecret }}
{{ include "lowbit.secretVolume" (list $ "tls" .) }}
{{- end }}
{{- end -}}

{{- define "lowbit.serverMounts" -}}
- {name: checkpoint, mountPath: /checkpoint, readOnly: true}
- {name: shared-memory, mountPath: /dev/shm}
{{- if include "lowbit.keysSecret" . }}
- {name: api-keys, mountPath: /etc/lowbit/keys, readOnly: true}
{{- end }}
{{- if .Values.tls.existingSecret }}
- {name: tls, mountPath: /etc/lowbit/tls, readOnly: true}
{{- end }}
{{- end -}}

{{/* Loading answers /startupz with 503; only then do the other two count. */}}
{{- define "lowbit.probes" -}}
{{- $scheme := include "lowbit.scheme" . -}}
startupProbe:
  httpGet: {path: /startupz, port: http, scheme: {{ $scheme }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div (add (include "lowbit.startupBudgetS" . | int) 4) 5 }}
livenessProbe:
  httpGet: {path: /livez, port: http, scheme: {{ $scheme }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: http, scheme: {{ $scheme }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
{{- end -}}

{{- define "lowbit.spread" -}}
{{- with .Values.topologySpread.topologyKey }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: {{ . | quote }}
    whenUnsatisfiable: {{ $.Values.topologySpread.whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "lowbit.selectorLabels" (list $ "server") | nindent 8 }}
    {{- if not (include "lowbit.multiNode" $) }}
    # Of the old and the new pods of a rollout, each is spread by itself.
    matchLabelKeys: [pod-template-hash]
    {{- end }}
{{- end }}
{{- end -}}

{{/* The user's own, then what must be there before the server starts: the Job's checkpoint, or the download of one. */}}
{{- define "lowbit.initContainers" -}}
{{- with .Values.initContainers }}
{{ toYaml . }}
{{- end }}
{{- if .Values.quantize.enabled }}
- name: wait-for-checkpoint
  # The manifest is written last.
  command: [sh, -c, 'until [ -f "$LOWBIT_DIR/lowbit.json" ]; do sleep 5; done']
  {{- include "lowbit.container" (dict "root" . "settings" true "mounts" "- {name: checkpoint, mountPath: /checkpoint, readOnly: true}") | nindent 2 }}
  resources:
    requests: {cpu: 10m, memory: 16Mi}
    limits: {memory: 64Mi}
{{- else if .Values.checkpoint.hub.id }}
{{- $id := splitList "@" .Values.checkpoint.hub.id }}
- name: download-checkpoint
  command: [hf, download, {{ first $id | quote }}, --revision, {{ last $id | quote }}, --local-dir, /checkpoint]
  {{- include "lowbit.container" (dict "root" . "env" (include "lowbit.downloadEnv" .) "mounts" (include "lowbit.downloadMounts" .)) | nindent 2 }}
  resources:
    {{- include "lowbit.resources" (dict "resources" (omit .Values.resources "claims") "gpus" 0) | nindent 4 }}
{{- end }}
{{- end -}}

{{- define "lowbit.downloadEnv" -}}
# The image says offline, for serving.
- {name: HF_HUB_OFFLINE, value: "0"}
{{- include "lowbit.hubEnv" .Values.checkpoint.hub }}
{{- end -}}

{{- define "lowbit.downloadMounts" -}}
- {name: checkpoint, mountPath: /checkpoint}
{{- include "lowbit.hubMount" .Values.checkpoint.hub }}
{{- end -}}
